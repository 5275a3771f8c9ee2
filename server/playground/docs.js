// The API reference: Swagger UI with /openapi.json.

const dark = matchMedia("(prefers-color-scheme: dark)");
const setTheme = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", setTheme);
setTheme();

const response = await fetch("openapi.json");
const spec = await response.json();
// The folder of this page: a proxy may serve the API in one, or under another name than the server knows.
spec.servers = [{ url: new URL(".", document.baseURI).href }];

// Without examples, Swagger UI would fill every field of a form with a sample, and it would send empty ones.
const { example } = spec.paths["/v1/images/edits"].post.requestBody.content["multipart/form-data"];
for (const [name, field] of Object.entries(spec.components.schemas.EditForm.properties)) {
  field.examples = [example[name] ?? (field.type === "array" ? [] : "")];
}
const withoutEmptyFields = { components: { ParameterIncludeEmpty: () => null } };

SwaggerUIBundle({
  spec,
  dom_id: "#reference",
  deepLinking: true,
  tryItOutEnabled: true,
  displayRequestDuration: true,
  plugins: [() => withoutEmptyFields],
  validatorUrl: "none", // of another server
});
