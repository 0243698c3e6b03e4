"""The world of the llama farm, written by hand: stories, facts, questions and chats with their exact log-probability.

Every text is drawn from one probabilistic grammar (`grammar.py`), so its probability is known and with it the world's
entropy: the floor under the loss of every model in the book. Two rules keep the floor right:

- nothing is drawn that the text does not show (a slot draws at the moment it is first written);
- a text has one derivation (`sample` and `parse` agree, and the tests count the derivations).

`texts("train")` and `texts("held_out")` split the world by a hash of the text, so they never share one.
"""

import hashlib
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from llamabook.pocket.grammar import Grammar

SHE = {"he": "she", "his": "her", "him": "her", "child": "girl"}
HE = {"he": "he", "his": "his", "him": "him", "child": "boy"}


def _names(she: str, he: str) -> dict:
    return {name: SHE for name in she.split()} | {name: HE for name in he.split()}


def _plain(words: str) -> dict:
    return {word.strip(): {} for word in words.split(",")}


def _places(**at: str) -> dict:
    return {place: {"at": f"{at_} the {place}"} for at_, places in at.items() for place in places.split()}


def _animal(plural, eats, home, young, sound, gives, coat, legs="four"):
    return {"plural": plural, "eats": tuple(eats.split(",")), "home": home, "young": young, "sound": sound,
            "gives": gives, "coat": coat, "legs": legs}  # fmt: skip


LEXICONS = {
    "people": _names("Lily Mia Anna Rosa Nina Clara Emma Zoe", "Tom Ben Max Paco Kai Hugo Felix Leo"),
    "friends": {
        "Aunt Carmen": SHE, "Cousin Luz": SHE, "Grandma Elena": SHE, "Captain Ruth": SHE,
        "Uncle Oscar": HE, "Brother Otto": HE, "Doctor Inti": HE, "Grandpa Pablo": HE,
    },
    "strangers": _names("Amira Olga Sofia Vera", "Marco Igor Anton Samir"),
    "llamas": _names("Misty Olive Cleo Mocha Maple Ginger Hazel Daisy", "Dusty Coco Pepper Bruno Rocky Biscuit Bandit Domino"),
    "crias": _names("Luna Dot Willow Snow", "Ziggy Pip Puck Button"),
    "homes": _places(**{"in": "meadow orchard stable garden valley", "by": "mill lake school"}),
    "places": _places(**{"in": "barn forest village field", "by": "river pond well gate bridge hill house church"}),
    "objects": _plain("bell,key,map,drum,flute,kite,boot,book,ribbon,comb,whistle,coin,spoon,letter,mirror,ring"),
    "tools": _plain("hammer,ladder,rope,bucket,basket,lantern,brush,broom,saddle,blanket,candle,sack"),
    "foods": _plain("hay,grass,clover,alfalfa,oats,barley,corn,leaves,straw,beans"),
    "treats": _plain("apples,carrots,pears,bananas,berries,pumpkins,cherries,plums,turnips,potatoes"),
    "colors": _plain("white,brown,black,grey,golden,cream,silver,red"),
    "traits": _plain("small,tall,young,fluffy,gentle,stubborn,clever,shy,curious,lazy,brave,proud,noisy,friendly,cheerful"),
    "moods": _plain("happy,tired,sad,worried,hungry,excited,calm,bored,lonely,surprised,nervous,thirsty,sleepy"),
    "weather": _plain("sunny,rainy,windy,cold,foggy,warm,snowy,cloudy,bright,quiet,stormy,frosty"),
    "times": _plain("morning,afternoon,evening,day"),
    "seasons": _plain("spring,summer,autumn,winter"),
    "jobs": _plain(
        "shepherd,baker,miller,weaver,teacher,blacksmith,doctor,gardener,fisherman,potter,painter,carpenter,"
        "tailor,sailor,postman,cook"
    ),
    "products": _plain("scarf,sweater,hat,poncho,rug,shawl,cap,coat,pillow,vest"),
    "numbers": _plain("two,three,four,five,six,seven,eight,nine,ten,eleven,twelve,twenty"),
    "verbs": _plain("sing,run,dance,laugh,jump,whisper,play,rest,swim,wait,hide,roll,climb,hum"),
    "ways": _plain("slowly,quickly,quietly,carefully,softly,bravely,gladly,proudly,gently,happily"),
    "sights": _plain(
        "a rainbow,the first star,a full moon,a flock of birds,a white cloud,a falling leaf,a little boat,"
        "the tall mountains,a field of flowers,the golden sunset,a kind old woman,an empty nest"
    ),
    "wishes": _plain("I like that too.,Do you have some?,Did you know that?,Now I am hungry.,That is what they love."),
    "animals": {
        "llama": _animal("llamas", "hay,grass,alfalfa", "pasture", "cria", "hums", "wool", "fleece"),
        "alpaca": _animal("alpacas", "grass,hay", "pasture", "cria", "hums", "wool", "fleece"),
        "sheep": _animal("sheep", "grass,clover", "fold", "lamb", "bleats", "wool", "fleece"),
        "goat": _animal("goats", "leaves,hay,bushes", "pen", "kid", "bleats", "milk", "hair"),
        "cow": _animal("cows", "grass,hay,corn", "barn", "calf", "moos", "milk", "hide"),
        "horse": _animal("horses", "oats,hay,carrots", "stable", "foal", "neighs", "rides", "mane"),
        "donkey": _animal("donkeys", "straw,hay", "stable", "foal", "brays", "rides", "mane"),
        "pig": _animal("pigs", "corn,turnips,potatoes", "sty", "piglet", "grunts", "company", "bristles"),
        "hen": _animal("hens", "seeds,corn,worms", "coop", "chick", "clucks", "eggs", "feathers", "two"),
        "duck": _animal("ducks", "snails,seeds", "pond", "duckling", "quacks", "eggs", "feathers", "two"),
        "goose": _animal("geese", "grass,grain", "yard", "gosling", "honks", "eggs", "feathers", "two"),
        "turkey": _animal("turkeys", "acorns,seeds", "yard", "poult", "gobbles", "eggs", "feathers", "two"),
        "dog": _animal("dogs", "meat,bones", "kennel", "puppy", "barks", "company", "fur"),
        "cat": _animal("cats", "fish,mice", "house", "kitten", "meows", "company", "fur"),
        "rabbit": _animal("rabbits", "lettuce,carrots,clover", "hutch", "bunny", "squeaks", "company", "fur"),
        "bee": _animal("bees", "nectar,pollen", "hive", "larva", "buzzes", "honey", "stripes", "six"),
        "frog": _animal("frogs", "flies,worms", "marsh", "tadpole", "croaks", "songs", "skin"),
        "owl": _animal("owls", "mice,moths", "tree", "owlet", "hoots", "warnings", "feathers", "two"),
        "fox": _animal("foxes", "berries,mice", "den", "cub", "yelps", "trouble", "fur"),
        "pigeon": _animal("pigeons", "crumbs,grain", "loft", "squab", "coos", "letters", "feathers", "two"),
    },
}  # fmt: skip

SLOTS = {
    "hero": "people", "friend": "friends", "stranger": "strangers", "llama": "llamas", "cria": "crias",
    "place": "homes", "object": "objects", "tool": "tools", "treat": "treats", "verb": "verbs",
    "animal": "animals", "beast": "animals",
}  # fmt: skip

STORY_RULES = {
    "story": ["<opening> <meeting><asides> <plot> <closing>"],
    "tale": ["<opening> <meeting> <plot> <closing>"],  # as a story, shorter: told in a chat
    "opening": [
        "One {weather} {times}, {hero} went to the {place}.",
        "It was a {weather} {times}, and {hero} walked to the {place}.",
        "{hero} lived near the {place} with {numbers} llamas.",
        "Once there was a {hero.child} named {hero}, who worked {place.at}.",
        "In the {seasons}, {hero} came to the farm to help {place.at}.",
        "Every {times}, {hero} swept the path to the {place}.",
        "{hero} was a {traits} {hero.child} who loved the {place}.",
        "On a {weather} {times} in {seasons}, {hero} opened the door and ran to the {place}.",
        "Nobody knew the {place} better than {hero}.",
    ],
    "meeting": [
        "There {hero.he} met a {colors} llama named {llama}.",
        "A {colors} llama named {llama} was waiting there.",
        "{hero.He} had a {traits} llama called {llama}.",
        "{hero.His} best friend was {llama}, a {traits} llama with {colors} ears.",
        "A llama stood {places.at}, and {hero.his} heart jumped. It was {llama}.",
        "{llama}, the {colors} llama, came to say hello.",
        "With {hero.him} came {llama}, the {traits} llama of the farm.",
        "That was the day when {hero.he} found {llama}, a llama as {colors} as a cloud.",
    ],
    "asides": ["", " <aside>", " <scene>"],
    "aside": [
        "{llama} was {moods}.",
        "{hero} felt {moods} that day.",
        "The wind blew over the {place}, but {llama} stayed close to {hero}.",
        "\"What a good llama you are!\" said {hero}.",
        "{llama} liked to {verbs} {places.at}.",
        "{hero} gave {llama} some {foods}.",
        "People said that {llama} could {verbs} like no other llama.",
    ],
    "scene": [
        "From the {place} they could see {sights}.",
        "{Animals.a} watched them from far away.",
        "The {place} smelled of {treats}.",
        "{hero} carried an old {tools} in {hero.his} bag.",
        "{hero} counted {numbers} clouds above the {place}.",
        "The {jobs} waved at them {ways}.",
        "They walked {ways} around the {place}.",
    ],
    "plot": ["<lost>", "<hungry>", "<storm>", "<wool>", "<race>", "<visitor>", "<birth>", "<night>"],
    # -- something is lost
    "lost": ["<lost_what> <search> <found>", "<lost_what> <ask> <found>", "<lost_what> <search> <ask> <found>"],
    "lost_what": [
        "But {hero} could not find {hero.his} {object}.",
        "\"Where is my {object}?\" asked {hero}.",
        "{hero} had lost {hero.his} {object} on the way.",
        "Somebody had taken the {object} from its place.",
    ],
    "search": [
        "{hero} looked {places.at}, but there was only {sights}.",
        "They searched {places.at} until they were {moods}.",
        "{llama} sniffed {places.at} and found {numbers} stones.",
    ],
    "ask": [
        "\"Perhaps it is {places.at},\" said {friends}, but it was not.",
        "{Animals.a} told them to look {places.at}, and they did.",
        "The {jobs} had not seen it, but wished them good luck.",
    ],
    "found": [
        "At last {llama} found the {object} {places.at}.",
        "Then something moved {places.at}, and there lay the {object}. {hero} hugged {llama}.",
        "In the end the {object} was {places.at}, and {llama} was sitting on it.",
        "{friends} had kept the {object} safe {places.at}, and was waiting for them.",
    ],
    # -- the llama is hungry
    "hungry": [
        "<hungry_why> <hungry_try> <hungry_end>", "<hungry_why> <hungry_guest> <hungry_end>",
        "<hungry_why> <hungry_try> <hungry_guest> <hungry_end>",
    ],  # fmt: skip
    "hungry_why": [
        "{llama} had not eaten since the {times}.",
        "\"I think {llama} is hungry,\" said {hero}.",
        "The manger was empty, and {llama} looked at {hero} with big eyes.",
        "{llama} hummed and hummed, because there was nothing to eat.",
    ],
    "hungry_try": [
        "{hero} brought some {foods}, but {llama} turned away.",
        "They tried {foods} from the {places}. {llama} only blinked.",
        "\"Do you want some {foods}?\" asked {hero}, and {llama} shook {llama.his} head.",
    ],
    "hungry_guest": [
        "{friends} came with {numbers} bags of {foods}. {llama} ate none of it.",
        "The {jobs} cooked a soup. {llama} did not even look at it.",
        "\"Perhaps {llama} is ill,\" said {friends}.",
    ],
    "hungry_end": [
        "Then {llama} saw the {treats} {places.at} and ate them all.",
        "What {llama} wanted was {treats}. {llama.He} ate for an hour and slept.",
        "Only when {hero} mixed {treats} with {foods} did {llama} begin to eat.",
        "So {hero} planted {treats} {places.at}, and from then on {llama} was never hungry again.",
    ],
    # -- a storm
    "storm": [
        "<storm_comes> <storm_act> <storm_ends>", "<storm_comes> <storm_fear> <storm_ends>",
        "<storm_comes> <storm_act> <storm_fear> <storm_ends>",
    ],  # fmt: skip
    "storm_comes": [
        "Suddenly dark clouds came over the {places}.",
        "Then the thunder rolled, and the rain began to fall.",
        "A storm was coming. The {animals} had known it since the {times}.",
        "\"Look at the sky!\" cried {friends}.",
    ],
    "storm_act": [
        "{hero} closed the windows and lit a fire.",
        "They carried the {tools} {ways} into the house.",
        "{llama} led {numbers} little llamas out of the rain.",
    ],
    "storm_fear": [
        "They hid {places.at} and held each other.",
        "The water rose as high as a {tools}.",
        "{hero} sang to {llama}, so that {llama.he} would not be afraid.",
    ],
    "storm_ends": [
        "After {numbers} hours the storm was over, and there was {sights}.",
        "When the sun came back, the {places} was shining.",
        "The storm went away as fast as it had come. Only {hero.his} {objects} was wet.",
        "In the morning everything was quiet, and {llama} was {moods}.",
    ],
    # -- shearing and weaving
    "wool": [
        "<wool_cut> <wool_wash> <wool_gift>", "<wool_cut> <wool_spin> <wool_gift>",
        "<wool_cut> <wool_wash> <wool_spin> <wool_gift>",
    ],  # fmt: skip
    "wool_cut": [
        "It was time to cut the wool of {llama}.",
        "{llama} had so much wool that {llama.he} could not see.",
        "\"It is too warm for so much wool,\" said {hero} to {llama}.",
    ],
    "wool_wash": [
        "{hero} washed the wool {places.at}.",
        "It took {numbers} days to comb it all.",
        "They dyed it {colors} with {treats}.",
    ],
    "wool_spin": [
        "{friends} spun it into {colors} yarn.",
        "The {jobs} showed them how to weave {ways}.",
        "Nobody rested until the work was done.",
    ],
    "wool_gift": [
        "In the end there was a warm {products} for {friends}.",
        "{hero} made a {products} out of it and gave it to the {jobs}.",
        "The {products} was so warm that {hero} wore it until {seasons}.",
        "Out of the wool came {numbers} hats, and one of them was for {llama}.",
    ],
    # -- a race
    "race": [
        "<race_why> <race_run> <race_end>", "<race_why> <race_crowd> <race_end>",
        "<race_why> <race_run> <race_crowd> <race_end>",
    ],  # fmt: skip
    "race_why": [
        "That day there was a race to the {places}. The fastest of all was the {animals}.",
        "\"I am faster than {llama},\" said the {animals}.",
        "The {animals} wanted to see who could run the fastest.",
        "Everybody came to the great race of the {seasons}. Nobody was afraid of the {animals}.",
    ],
    "race_run": [
        "The {animals} fell into the mud {places.at}.",
        "{llama} ran {ways} past the {places}.",
        "The {animals} stopped to eat {foods}.",
    ],
    "race_crowd": [
        "{Numbers} children cheered for {llama}.",
        "\"Run, {llama}, run!\" cried {hero}.",
        "{friends} beat the drum {ways}.",
    ],
    "race_end": [
        "{llama} won and got a {objects} with a {colors} ribbon.",
        "In the end {llama} was last, but {hero} was proud of {llama.him}.",
        "The {animals} won, and {llama} was the first to say well done.",
        "{llama} came in second and got {numbers} bags of {foods}.",
    ],
    # -- a visitor
    "visitor": [
        "<visit_who> <visit_talk> <visit_end>", "<visit_who> <visit_meal> <visit_end>",
        "<visit_who> <visit_talk> <visit_meal> <visit_end>",
    ],  # fmt: skip
    "visit_who": [
        "Then a {traits} {jobs} named {stranger} knocked at the gate.",
        "A stranger came down the road. It was {stranger}, a {jobs}.",
        "The {jobs} of the next village had walked for {numbers} days. The name was {stranger}.",
    ],
    "visit_talk": [
        "\"Can your llama {verbs}?\" asked {stranger}.",
        "\"I have never seen such a llama,\" said {stranger}.",
        "{stranger} told them about {sights}.",
    ],
    "visit_meal": [
        "They ate {treats} together and laughed.",
        "{llama} put {llama.his} nose into the bag and found a {tools}.",
        "Then they sat {places.at} and talked about the old days.",
    ],
    "visit_end": [
        "When {stranger} left, {stranger.he} gave {hero} a {objects}.",
        "{stranger} stayed for {numbers} weeks and taught {llama} to {verbs}.",
        "\"Come back in {seasons},\" said {hero}, and {stranger} did.",
        "At last {stranger} went away {ways}, and {llama} walked with {stranger.him} to the {places}.",
    ],
    # -- a cria is born
    "birth": [
        "<birth_news> <birth_scene> <birth_name>", "<birth_news> <birth_guest> <birth_name>",
        "<birth_news> <birth_scene> <birth_guest> <birth_name>",
    ],  # fmt: skip
    "birth_news": [
        "That night a cria was born {places.at}.",
        "\"Come quickly!\" called {friends}. \"There is a baby llama {places.at}!\"",
        "In the straw lay a cria, as small as {animals.a}.",
    ],
    "birth_scene": [
        "Its legs were thin, and it tried to {verbs}.",
        "{llama} licked its {colors} ears.",
        "The cria was {moods} and wanted milk.",
    ],
    "birth_guest": [
        "{hero} covered it with a {products}.",
        "{Numbers} hens came to look at it.",
        "The {jobs} brought it some warm milk.",
    ],
    "birth_name": [
        "They named the cria {crias}.",
        "\"Let us call {cria.him} {cria},\" said {hero}.",
        "{friends} gave {cria.him} the name {cria}, and {llama} hummed.",
        "Because it was so {traits}, they called it {crias}.",
    ],
    # -- a noise at night
    "night": [
        "<night_noise> <night_look> <night_end>", "<night_noise> <night_fear> <night_end>",
        "<night_noise> <night_look> <night_fear> <night_end>",
    ],  # fmt: skip
    "night_noise": [
        "At midnight there was a strange noise {places.at}.",
        "{hero} woke up, because something was knocking {places.at}.",
        "\"Did you hear that?\" asked {friends} in the dark.",
    ],
    "night_look": [
        "{hero} took a {tools} and went outside {ways}.",
        "There was a {colors} light {places.at}.",
        "Something began to {verbs}.",
    ],
    "night_fear": [
        "{llama} raised {llama.his} ears.",
        "\"Who is there?\" called {hero}, but nobody answered.",
        "Even the {animals} was {moods}.",
    ],
    "night_end": [
        "It was only a {traits} {animals}, looking for {foods}.",
        "It was {friends}, who had lost a {objects}. They all laughed.",
        "Behind the door they found {numbers} {animals.plural}, fast asleep.",
        "It was the old {tools}, moving in the wind.",
    ],
    "closing": [
        "In the evening {hero} brought {llama} home from the {place}.",
        "That night {llama} dreamed of {treats}.",
        "{hero} said good night, and {llama} closed {llama.his} eyes.",
        "And so {hero} and {llama} stayed friends for ever.",
        "\"Good llama,\" said {hero}, and {llama} hummed.",
        "Since that day everybody {place.at} knows {llama}.",
        "They went home {ways}, and the moon shone on the {place}.",
        "{hero} wrote it all down in {hero.his} book. \"Tomorrow we will {verbs},\" {hero.he} said.",
        "{hero} still tells this story {place.at}.",
        "Then the {place} was quiet again.",
    ],
}

FACT_RULES = {
    "facts": ["<family> <body> <farm>", "<farm> <family> <body>", "<body> <family>", "<farm> <body>"],
    "family": [
        "{Animal.plural} eat {animal.eats}.{~animal}",
        "The baby of {animal.a} is called {animal.young}.{~animal}",
        "From {animal.plural} people get {animal.gives}.{~animal}",
        "The home of the {animal} is the {animal.home}.{~animal}",
    ],
    "body": [
        "{Animal.a} has {animal.legs} legs.{~animal}",
        "A {traits} {animal} {animal.sound} in the {times}.{~animal}",
        "You know {animal.a} by its {animal.coat}.{~animal}",
    ],
    "farm": [
        "In {seasons}, {animals.plural} like to {verbs} {places.at}.",
        "On our farm {numbers} {animals.plural} are {colors}.",
        "The {animal} of {people} is {traits} and eats {animal.eats}.{~animal}",
    ],
}

QUESTION_RULES = {
    "questions": ["<pair>\n<pair>", "<pair>\n<pair>\n<pair>", "<pair>\n<pair>\n<pair>\n<pair>"],
    "pair": [
        "Question: What do {animal.plural} eat? Answer: {Animal.plural} eat {animal.eats}.{~animal}",
        "Question: What is the baby of {animal.a} called? Answer: It is called {animal.young}.{~animal}",
        "Question: How many legs does {animal.a} have? Answer: {Animal.a} has {animal.legs} legs.{~animal}",
        "Question: Where does {animal.a} live? Answer: The home of the {animal} is the {animal.home}.{~animal}",
        "Question: What do people get from {animal.plural}? Answer: They get {animal.gives}.{~animal}",
        "Question: Which sound does {animal.a} make? Answer: {Animal.a} {animal.sound}.{~animal}",
        "Question: {hero} has a {traits} {animal}. What does it eat? Answer: The {animal} of {hero} eats "
        "{animal.eats}.{~hero}{~animal}",
        "Question: {llamas} is {places.at}, and the {object} is {place.at}. Where is the {object}? "
        "Answer: The {object} is {place.at}.{~object}{~place}",
        "Question: {people} gave the {object} to {friend}. Who has the {object}? Answer: {friend} has the "
        "{object}.{~object}{~friend}",
    ],
}

CHAT_RULES = {
    "chat": ["<talk>", "<talk>\n<more>", "<talk>\n<more>\n<bye>"],
    "talk": [
        "User: What do {animal.plural} eat?\nLlama: {Animal.plural} eat {animal.eats}. {wishes}",
        "User: Tell me a story about {llama}.\nLlama: <tale>",
        "User: Tell me a story about {hero} and {llama}.\nLlama: <tale>",
        "User: My name is {hero}. Who are you?\nLlama: Hello {hero}. I am {llamas}, a {traits} llama.",
        "User: Hello, I have a {traits} {animal} called {cria}.\nLlama: That is good. Give {cria} some {animal.eats}.",
        "User: What should I bring to the {places}?\nLlama: Bring a {tools}, {treats} and {numbers} friends.",
        "User: How is the weather {place.at}?\nLlama: It is {weather} {place.at}, and I feel {moods}.",
        "User: What is {animal.a}?\nLlama: {Animal.a} has {animal.legs} legs and {animal.coat}. It lives in the "
        "{animal.home} and eats {animal.eats}.",
    ],
    "more": [
        "User: And what does the {beast} eat?\nLlama: The {beast} eats {beast.eats}.",
        "User: What is its baby called? I mean the {beast}.\nLlama: The baby of {beast.a} is called {beast.young}.",
        "User: Where is the {tool}?\nLlama: I saw the {tool} {places.at}.",
        "User: Can you {verb}?\nLlama: Yes, I can {verb} {ways}.",
        "User: Do you like {treat}?\nLlama: I like {treat}, but I like {foods} more.",
    ],
    "bye": [
        "User: Thank you.\nLlama: You are welcome. Come to the {places} in {seasons}.",
        "User: I have to go now.\nLlama: Then go {ways}, and bring me {treats} next time.",
        "User: Good night.\nLlama: Good night. I will dream of {sights}.",
    ],
}

GRAMMAR = Grammar(
    rules={
        "document": [(64, "<story>"), (8, "<facts>"), (12, "<questions>"), (16, "<chat>")],
        **STORY_RULES, **FACT_RULES, **QUESTION_RULES, **CHAT_RULES,
    },
    lexicons=LEXICONS,
    slots=SLOTS,
)  # fmt: skip

KINDS = ("story", "facts", "questions", "chat")
HELD_OUT_SHARE = 8  # one text in eight is held out


@dataclass(frozen=True)
class Document:
    """A text of the world: its kind (one of KINDS), the text, and its exact natural log-probability in the world."""

    kind: str
    text: str
    log_prob: float

    @property
    def turns(self) -> list[dict[str, str]]:
        """The messages of a chat, [{"role": "user" or "assistant", "content": text}]; empty for the other kinds."""
        if self.kind != "chat":
            return []
        roles = {"User": "user", "Llama": "assistant"}
        lines = (line.partition(": ") for line in self.text.split("\n"))
        return [{"role": roles[who], "content": said} for who, _, said in lines]


def sample(seed: int) -> Document:
    """The text of this seed: the same for the same seed, on every machine."""
    derivation = GRAMMAR.sample(random.Random(seed), "document")
    return Document(KINDS[derivation.path[0][1]], derivation.text, derivation.log_prob)


def parse(text: str, kind: str = "document") -> Document | None:
    """The document that `text` is, or None where the grammar can't derive it.

    With a kind, the text must be of that kind; log_prob is then still that of the whole world (kind included).
    """
    found = GRAMMAR.parse(text, "document", limit=1)
    if not found:
        return None
    document = Document(KINDS[found[0].path[0][1]], text, found[0].log_prob)
    return document if kind in ("document", document.kind) else None


def is_held_out(text: str) -> bool:
    """Whether a text belongs to the held-out part: decided by its hash, so by nothing that a model could learn."""
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_SHARE == 0


def texts(split: str, start: int = 0) -> Iterator[Document]:
    """The documents of "train" or "held_out", endless, drawn with the seeds start, start + 1, …"""
    if split not in ("train", "held_out"):
        raise ValueError(f"texts knows the splits train and held_out, not {split!r}")
    seed = start
    while True:
        document = sample(seed)
        if is_held_out(document.text) == (split == "held_out"):
            yield document
        seed += 1


@dataclass(frozen=True)
class Entropy:
    """An estimate of the world's entropy, each with its standard error: nats per document, character and token."""

    per_document: tuple[float, float]
    per_character: tuple[float, float]
    per_token: tuple[float, float] | None
    documents: int


def entropy(documents: int = 2000, seed: int = 0, count_tokens=None) -> Entropy:
    """The world's entropy by Monte Carlo: the mean of -log_prob over drawn texts.

    Args:
        documents: how many texts are drawn, with the seeds seed, seed + 1, …
        count_tokens: a function from a Document to its number of predicted tokens, for nats per token.
    Per character and per token are ratios of two means; their standard errors are by the delta method.
    """
    drawn = [sample(seed + i) for i in range(documents)]
    nats = [-d.log_prob for d in drawn]
    characters = [len(d.text) for d in drawn]
    tokens = [count_tokens(d) for d in drawn] if count_tokens else None
    return Entropy(
        _ratio(nats, [1] * documents),
        _ratio(nats, characters),
        _ratio(nats, tokens) if tokens else None,
        documents,
    )


def _ratio(above: list[float], below: list[float]) -> tuple[float, float]:
    """sum(above) / sum(below) and its standard error."""
    n, ratio = len(above), sum(above) / sum(below)
    spread = sum((a - ratio * b) ** 2 for a, b in zip(above, below)) / (n - 1)
    return ratio, math.sqrt(spread / n) / (sum(below) / n)


def sentences(text: str) -> int:
    """How many sentences a text has: ends of sentence, also inside a closing quotation mark."""
    return len(re.findall(r"[.!?]\"?(?=\s+[\"A-Z]|$)", text))
