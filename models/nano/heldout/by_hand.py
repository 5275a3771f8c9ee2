"""Sentences written by hand, each with what its poster shows. "?" is what the sentence leaves open."""

from models.nano.recipe import codes
from models.nano.recipe.facts import COLOUR_FACTS, Fact, Facts
from models.nano.recipe.world import Line, Poster, Shape, Side, Zone

# Prompt, then background | lines as zone=TEXT or zone=TEXT/bar | shapes as size colour kind side; - for none
SENTENCES = r"""
Make me a yellow poster that says "LEMONADE" at the top and "50 CENTS" at the bottom, with a red heart in the middle
    | yellow | headline=LEMONADE footer=50_CENTS | ? red heart center
headline "LEMONS" on top, "FRESH" below
    | ? | headline=LEMONS footer=FRESH | -
Poster: pink. Top: "BALLET". Middle: small blue cross. Bottom: "7 PM".
    | pink | headline=BALLET footer=7_PM | small blue cross center
Hi! I need a sign for my door that says "QUIET" please, with a big red circle on it
    | ? | headline=QUIET | large red circle ?
I'd like a green poster with "PLANT SALE" as the headline and a white star below it
    | green | headline=PLANT_SALE | ? white star center
Can you draw "HELLO" at the top of a black background and put a tiny yellow star on the right?
    | black | headline=HELLO | small yellow star right
Our school play is on Friday. Make a purple flyer, title "THE STORM", footer "FRIDAY".
    | purple | headline=THE_STORM footer=FRIDAY | -
blue background, white circle
    | blue | - | ? white circle ?
"SALE"
    | ? | headline=SALE | -
write "BOO" on an orange poster, with a black ring in the center
    | orange | headline=BOO | ? black ring center
a poster for our band with the word "NOISE" on top and "LIVE" underneath
    | ? | headline=NOISE footer=LIVE | -
A teal diamond and an orange diamond side by side on white. Above them it says "TWINS".
    | white | headline=TWINS | ? teal diamond left, ? orange diamond right
On the left a red square, on the right a blue square, background white, bottom text "CHOOSE"
    | white | footer=CHOOSE | ? red square left, ? blue square right
two pink hearts on a white card, headline "US"
    | white | headline=US | ? pink heart left, ? pink heart right
Please make the background red. The headline should say "STOP". Nothing else.
    | red | headline=STOP | -
Top headline "GYM", center hero image a large black cross, bottom footer bar "OPEN"
    | ? | headline=GYM footer=OPEN | large black cross center
Don't use any text, just a huge yellow star in the middle of a blue poster
    | blue | - | large yellow star center
poster with colour teal as the background; heading “KARAOKE”; footer “SATURDAY”
    | teal | headline=KARAOKE footer=SATURDAY | -
「SUSHI」 at the top, a red circle in the middle, white background
    | white | headline=SUSHI | ? red circle center
i want a sign that says "WET PAINT" on a yellow bar at the top, black background
    | black | headline=WET_PAINT/yellow | -
The bottom of the poster reads "BYE", the top of the poster reads "HI". Orange background.
    | orange | headline=HI footer=BYE | -
orange poster, small heart in purple on the left, title 'CATS'
    | orange | headline=CATS | small purple heart left
make a nice birthday poster saying happy birthday, pink background with a large white heart
    | pink | - | large white heart ?
A white poster. In the middle, a big green triangle. At the bottom, the word "CAMP".
    | white | footer=CAMP | large green triangle center
I want a blue sign with "POOL" at the top, "CLOSED" at the bottom and nothing in between
    | blue | headline=POOL footer=CLOSED | -
make it say "RUN" at the top! also a small orange triangle in the centre. background: navy
    | blue | headline=RUN | small orange triangle center
Title: "BINGO"\nSubtitle: "TONIGHT"\nBackground: green
    | green | headline=BINGO subtitle=TONIGHT | -
headline "NEW", subtitle "MENU", a small red diamond in the middle, footer "TRY IT", yellow background
    | yellow | headline=NEW subtitle=MENU footer=TRY_IT | small red diamond center
just the word "OK" in the middle of a black poster
    | black | middle=OK | -
three lines: "ONE", "TWO", "THREE" on a white background
    | white | headline=ONE middle=TWO footer=THREE | -
A purpel poster with a yelow star in the middle and "WOW" at the top
    | purple | headline=WOW | ? yellow star center
Give me a flyer for "JAZZ" with a big blue ring, please and thank you
    | ? | headline=JAZZ | large blue ring ?
a red heart under the headline "LOVE", and at the bottom "PARIS", white background
    | white | headline=LOVE footer=PARIS | ? red heart center
I run a bakery: could you make a sign that reads "BREAD" above a small brown-free yellow circle in the middle?
    | ? | headline=BREAD | small yellow circle center
GRAND day! Put "GRAND OPENING" on top of a red poster and "MAY 4" at the bottom
    | red | headline=GRAND_OPENING footer=MAY_4 | -
"HAPPY BIRTHDAY" at the top, "LUCY" at the bottom, big pink heart in the center, white background
    | white | headline=HAPPY_BIRTHDAY footer=LUCY | large pink heart center
The sign's background is black, its title is "SHHH", and it has a small white square to the left
    | black | headline=SHHH | small white square left
green square next to a yellow circle; footer "SHAPES"
    | ? | footer=SHAPES | ? green square left, ? yellow circle right
Could you please create a minimalist poster in white with a small black dot in the middle
    | white | - | small black circle center
poster about summer, background yellow, large orange circle in the centre, "SUN" across the top, "FUN" across the bottom
    | yellow | headline=SUN footer=FUN | large orange circle center
""".strip()


def cases() -> list[tuple[str, Facts]]:
    """Return the sentences and their facts."""
    lines = SENTENCES.replace("\n    | ", "|").splitlines()
    return [_case(line) for line in lines]


def _case(sentence: str) -> tuple[str, Facts]:
    prompt, background, lines, shapes = (part.strip(" -") for part in sentence.split("|"))
    open_facts: set[Fact] = {"background"} if background == "?" else set()
    placed: dict[Zone, Line] = {}
    for item in lines.split():
        zone, text = item.split("=")
        text, _, bar = text.partition("/")
        placed[zone] = Line(text.replace("_", " "), codes.COLOURS.index(bar) if bar else None)  # pyright: ignore
    found = []
    for item, colour_fact in zip(filter(None, shapes.split(",")), COLOUR_FACTS, strict=False):
        size, colour, kind, side = item.split()
        open_facts |= {"size"} if size == "?" else set()
        open_facts |= {"side"} if side == "?" else set()
        open_facts |= {colour_fact} if colour == "?" else set()
        at: Side = side if side in ("left", "right") else "center"  # pyright: ignore[reportAssignmentType]
        found.append(Shape(codes.SHAPES.index(kind), max(0, _colour(colour)), size == "large", at))
    ground = _colour(background) if background != "?" else _unused(found)
    poster = Poster(ground, shapes=tuple(found)).with_lines(placed)
    return prompt.replace("\\n", "\n"), Facts(poster, frozenset(open_facts))


def _colour(name: str) -> int:
    return codes.COLOURS.index(name) if name in codes.COLOURS else -1


def _unused(shapes: list[Shape]) -> int:
    """Return a background on which the shapes would show."""
    return next(c for c in range(len(codes.COLOURS)) if c not in {shape.colour for shape in shapes})
