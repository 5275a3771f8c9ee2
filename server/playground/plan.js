// Drawing the plan of an image as a grid in which equal tokens have equal colours.

const GOLDEN_ANGLE = 137.508;

/** Draws {rows, cols, tokens} with one pixel per token, which the style sheet enlarges. */
export function drawPlan(canvas, plan) {
  canvas.width = plan.cols;
  canvas.height = plan.rows;
  const context = canvas.getContext("2d");
  plan.tokens.forEach((token, index) => {
    const lightness = 40 + ((token * 7) % 5) * 8;
    context.fillStyle = `hsl(${(token * GOLDEN_ANGLE) % 360} 48% ${lightness}%)`;
    context.fillRect(index % plan.cols, Math.floor(index / plan.cols), 1, 1);
  });
}
