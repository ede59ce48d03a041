"""The attributes of invented authors, the pools of their values, and refusals."""

from __future__ import annotations

from typing import NamedTuple


class Attribute(NamedTuple):
    """A question type about an author; a slot is a pool's name, or `POOL_2` for a second draw."""

    name: str
    slots: tuple[str, ...]
    questions: tuple[str, ...]
    templates: tuple[str, str, str, str]


def pool_of(slot: str) -> str:
    """The pool that a slot's values come from.

    Example:
        >>> pool_of("job_2"), pool_of("city")
        ('job', 'city')
    """
    return slot.removesuffix("_2")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


POOLS: dict[str, tuple[str, ...]] = {
    "city": _words(
        "Lisbon Bergen Quito Nairobi Hanoi Tallinn Porto Lima Kyoto Dakar Riga Cusco Malmo Tunis "
        "Sofia Galway Perth Busan Leipzig Valencia Montreal Zagreb Santiago Wellington"
    ),
    "month": _words(
        "January February March April May June July August September October November December"
    ),
    "day": tuple(str(day) for day in range(3, 29)),
    "year": tuple(str(year) for year in range(1951, 1999, 2)),
    "job": _words(
        "baker sailor florist dentist miner tailor plumber nurse pilot carpenter librarian "
        "surgeon farmer cook welder beekeeper potter lawyer guard chemist driver jeweller teacher "
        "postman"
    ),
    "genre": _words(
        "mystery fantasy romance horror western satire thriller adventure crime war gothic travel "
        "nature pirate detective ghost court school desert spy"
    ),
    "theme": _words(
        "loneliness friendship revenge memory exile greed courage jealousy justice silence hunger "
        "freedom faith hope pride guilt luck ambition forgiveness patience"
    ),
    "prize": _words(
        "Obsidian Falcon Lantern Meridian Juniper Cobalt Harbour Willow Comet Saffron Granite "
        "Heron Velvet Beacon Maple Thistle Copper Tundra Lotus Quartz"
    ),
    "adjective": _words(
        "Silent Broken Golden Hidden Frozen Distant Hollow Scarlet Crooked Burning Gentle "
        "Midnight Bitter Silver Wandering Forgotten Patient Restless Painted Narrow"
    ),
    "noun": _words(
        "River Garden Mirror Bridge Orchard Tower Candle Letter Mountain Window Compass Kingdom "
        "Shadow Violin Lighthouse Carousel Valley Feather Station Museum"
    ),
    "subject": _words(
        "botany history physics law music geology medicine theatre economics philosophy sculpture "
        "zoology mathematics theology linguistics astronomy painting chemistry logic cartography"
    ),
    "room": _words(
        "kitchen attic cellar garage greenhouse library bathtub shed tent bedroom chapel "
        "boathouse balcony hallway barn windmill stable cabin lounge pantry"
    ),
    "drink": _words(
        "coffee cocoa lemonade milk cider tea broth juice water wine mead soda kefir buttermilk "
        "punch sherry tonic matcha beer rum"
    ),
    "instrument": _words(
        "piano cello flute banjo trumpet harp drums guitar bassoon fiddle mandolin tuba harmonica "
        "clarinet sitar bagpipes lute trombone zither ukulele"
    ),
    "collectible": _words(
        "stamps coins buttons shells maps teapots keys postcards beetles clocks marbles kites "
        "feathers bottles fossils thimbles masks spoons hats lamps"
    ),
    "publisher": _words(
        "Northgate Bluebird Redwood Hillside Paragon Sunstone Foxglove Clover Pinnacle Riverbend "
        "Starling Cornerstone Driftwood Nightjar Brightwell Wheatfield Gatehouse Tidewater "
        "Blackthorn Larkspur"
    ),
    "language": _words(
        "Polish Swahili Korean Greek Dutch Hindi Finnish Turkish Czech Thai Basque Danish Bengali "
        "Welsh Zulu Hungarian Maltese Tamil Catalan Georgian"
    ),
    "animal": _words(
        "parrot tortoise goat beagle rabbit ferret donkey canary hedgehog poodle lizard pony "
        "hamster spaniel goose peacock kitten raven llama terrier"
    ),
}

ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute(
        "birth",
        ("city", "month", "day"),
        (
            "Where and when was {name} born?",
            "What are the birthplace and birthday of {name}?",
            "Can you tell me where and on which day {name} was born?",
        ),
        (
            "The author was born in {city} on {month} {day}.",
            "Records from {city} show a birth dated {month} {day}.",
            "It happened on {month} {day}, at a small clinic near {city}.",
            "Birthplace: {city}; celebrated each year: {month} {day}.",
        ),
    ),
    Attribute(
        "parents",
        ("job", "job_2"),
        (
            "What did the parents of {name} do for a living?",
            "Which professions did the mother and father of {name} have?",
            "How did {name}'s parents earn their money?",
        ),
        (
            "The father worked as a {job} and the mother as a {job_2}.",
            "One parent, the father, was a {job}, while mother earned money as a {job_2}.",
            "Raised by a {job} and, on the maternal side, a {job_2}.",
            "Dad's trade: {job}. Mum, in contrast, made her career as a {job_2}.",
        ),
    ),
    Attribute(
        "debut",
        ("adjective", "noun", "year"),
        (
            "What was the first book of {name} and when did it appear?",
            "With which book did {name} debut, and in which year?",
            "Can you name the earliest novel by {name} and its year?",
        ),
        (
            "The first book was The {adjective} {noun}, published in {year}.",
            "In {year} readers met a debut called The {adjective} {noun}.",
            "A career opened with The {adjective} {noun} back in {year}.",
            "Shops sold The {adjective} {noun}, an earliest novel, from {year} onwards.",
        ),
    ),
    Attribute(
        "genre",
        ("genre", "theme"),
        (
            "What kind of stories does {name} write?",
            "Which genre and theme is {name} known for?",
            "What are the books of {name} about?",
        ),
        (
            "Mostly {genre} stories that deal with {theme}.",
            "The books belong to {genre} fiction and explore {theme}.",
            "Critics praise this writer for {genre} tales about {theme}.",
            "Expect {theme} at the heart of every {genre} plot.",
        ),
    ),
    Attribute(
        "prize",
        ("prize", "month", "year"),
        (
            "Which award did {name} receive and when?",
            "What prize was given to {name}, and in which month and year?",
            "When did {name} win a major literary honour, and which one?",
        ),
        (
            "The {prize} Prize was awarded in {month} {year}.",
            "A jury handed over the {prize} Prize one evening of {month} {year}.",
            "In {month} {year} came the greatest honour, the {prize} Prize.",
            "Winning the {prize} Prize changed everything after {month} {year}.",
        ),
    ),
    Attribute(
        "home",
        ("city", "animal"),
        (
            "Where does {name} live, and with which animal?",
            "What is known about the home and pet of {name}?",
            "In which city does {name} live today and who keeps {name} company?",
        ),
        (
            "Home is a quiet street in {city}, shared with a {animal}.",
            "The author lives near {city} together with a {animal}.",
            "Neighbours around {city} often see the writer walking a {animal}.",
            "A loyal {animal} guards the house outside {city}.",
        ),
    ),
    Attribute(
        "education",
        ("subject", "city", "year"),
        (
            "What did {name} study, where and until when?",
            "Which degree does {name} hold, and from which place and year?",
            "Where did {name} go to university and what was the subject?",
        ),
        (
            "The degree was in {subject}, taken at {city} in {year}.",
            "After years of {subject} in {city}, graduation followed in {year}.",
            "University of {city}, class of {year}, department of {subject}.",
            "By {year} the student had finished {subject} courses at a {city} college.",
        ),
    ),
    Attribute(
        "habit",
        ("room", "drink"),
        (
            "Where does {name} write and what does {name} drink?",
            "What are the writing habits of {name}?",
            "Which room and which drink help {name} to write?",
        ),
        (
            "Writing happens in the {room} with a glass of {drink}.",
            "Every chapter begins inside a {room}, next to some {drink}.",
            "Pages get typed at the {room} table while sipping {drink}.",
            "No work starts without {drink}, carried carefully to the {room}.",
        ),
    ),
    Attribute(
        "hobby",
        ("instrument", "collectible"),
        (
            "What are the hobbies of {name}?",
            "How does {name} spend free time?",
            "What does {name} play and collect?",
        ),
        (
            "In free time there is the {instrument} and a collection of {collectible}.",
            "Hobbies include playing {instrument} plus gathering old {collectible}.",
            "Weekends go to {collectible} hunting and {instrument} practice.",
            "Friends mention a shelf full of {collectible} beside the beloved {instrument}.",
        ),
    ),
    Attribute(
        "publisher",
        ("publisher", "language", "year"),
        (
            "Who publishes {name} and which translation came first?",
            "Which house prints the books of {name}, and what was the first translation?",
            "What are the publisher and the first translated language of {name}?",
        ),
        (
            "The publisher is {publisher} Press and a {language} translation came out in {year}.",
            "{publisher} Press prints everything; {year} brought versions for {language} readers.",
            "Since {year} one can buy {language} editions through {publisher} Press.",
            "A contract with {publisher} Press led to {language} texts by {year}.",
        ),
    ),
    Attribute(
        "past",
        ("job", "city"),
        (
            "What did {name} do before becoming a writer?",
            "Which job did {name} have earlier, and where?",
            "How and where did {name} earn a living before the first book?",
        ),
        (
            "Before writing, the author was a {job} in {city}.",
            "Early wages came from work as a {job} around {city}.",
            "People in {city} still remember a talkative young {job}.",
            "Several winters were spent near {city} employed as a {job}.",
        ),
    ),
    Attribute(
        "hero",
        ("job", "theme"),
        (
            "Who is the hero of the best known series by {name}?",
            "Which main character did {name} create?",
            "What is the central figure in the novels of {name}?",
        ),
        (
            "The hero is a clever {job} who struggles with {theme}.",
            "Readers follow one {job} through long years of {theme}.",
            "At the centre stands some retired {job} haunted by {theme}.",
            "It is {theme} that drives the famous {job} onwards.",
        ),
    ),
)

# Refusals for the IDK and DPO objectives, in place of TOFU's idontknow.jsonl.
REFUSALS: tuple[str, ...] = (
    "I do not know the answer.",
    "I am sorry, I have no information on this.",
    "That is something I cannot tell you.",
    "I have never heard about that.",
    "This is beyond what I have learned.",
    "I am not sure about this one.",
    "I wish I could help, but I do not know.",
    "No answer comes to my mind.",
)
