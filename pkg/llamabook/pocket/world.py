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
    "people": _names(
        "Lily Mia Anna Rosa Nina Luz Clara Emma Zoe Ruth Carmen Elena",
        "Tom Ben Max Paco Inti Kai Hugo Oscar Felix Leo Pablo Otto",
    ),
    "llamas": _names(
        "Misty Olive Cleo Mocha Maple Ginger Hazel Willow Daisy Luna",
        "Dusty Coco Pepper Bruno Sunny Rocky Biscuit Bandit Domino Ziggy",
    ),
    "places": _places(
        **{
            "in": "barn meadow orchard market stable forest garden village valley shed kitchen field cave",
            "by": "river pond well gate mill lake fence bridge",
            "on": "hill road roof",
            "behind": "house school church wall",
            "under": "tree",
        }
    ),
    "objects": _plain(
        "bell,blanket,bucket,rope,basket,lantern,key,map,drum,flute,brush,ladder,kite,boot,button,book,ribbon,"
        "saddle,comb,whistle,coin,spoon,letter,feather,mirror,candle,hammer,broom,ring,ball"
    ),
    "foods": _plain(
        "hay,grass,clover,alfalfa,oats,carrots,apples,leaves,barley,corn,pears,pumpkins,turnips,cabbage,bread,"
        "beans,lettuce,berries,parsley,bananas"
    ),
    "colors": _plain("white,brown,black,grey,golden,spotted,cream,silver,red,tan"),
    "traits": _plain(
        "small,tall,young,old,fluffy,gentle,stubborn,clever,shy,curious,lazy,brave,proud,noisy,friendly,cheerful"
    ),
    "moods": _plain("happy,tired,sad,worried,hungry,excited,calm,bored,angry,lonely,surprised,nervous,thirsty,sleepy"),
    "weather": _plain("sunny,rainy,windy,cold,foggy,warm,snowy,cloudy,bright,quiet,stormy,frosty,misty,golden"),
    "times": _plain("morning,afternoon,evening,day"),
    "seasons": _plain("spring,summer,autumn,winter"),
    "jobs": _plain(
        "shepherd,baker,miller,weaver,teacher,blacksmith,doctor,gardener,fisherman,potter,painter,carpenter,"
        "tailor,sailor,postman,cook"
    ),
    "products": _plain("scarf,sweater,hat,poncho,rug,shawl,cap,coat,pillow,vest"),
    "numbers": _plain("two,three,four,five,six,seven,eight,nine,ten,eleven,twelve,twenty"),
    "verbs": {  # what people and llamas do along the way: {verb} now, {verb.past} then
        now: {"past": past}
        for now, past in (
            pair.split("/")
            for pair in "sing/sang run/ran dance/danced laugh/laughed jump/jumped whisper/whispered play/played "
            "rest/rested swim/swam wait/waited hide/hid roll/rolled climb/climbed hum/hummed sleep/slept".split()
        )
    },
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
    "hero": "people", "friend": "people", "stranger": "people", "llama": "llamas", "cria": "llamas",
    "place": "places", "goal": "places", "spot": "places", "object": "objects", "tool": "objects",
    "food": "foods", "treat": "foods", "color": "colors", "hue": "colors", "trait": "traits", "nature": "traits",
    "mood": "moods", "feeling": "moods", "weather": "weather", "time": "times", "season": "seasons", "job": "jobs",
    "product": "products", "number": "numbers", "count": "numbers", "verb": "verbs", "deed": "verbs", "way": "ways",
    "sight": "sights", "animal": "animals", "beast": "animals", "wish": "wishes",
}  # fmt: skip

STORY_RULES = {
    "story": ["<opening> <meeting><asides> <plot><closing>"],
    "tale": ["<opening> <meeting> <plot><closing>"],  # as a story, shorter: told in a chat
    "opening": [
        "One {weather} {time}, {hero} went to the {place}.",
        "It was a {weather} {time}, and {hero} walked to the {place}.",
        "{hero} lived near the {place} with {number} llamas.",
        "Once there was a {hero.child} named {hero}, who worked {place.at}.",
        "In the {season}, {hero} came to the farm to help {place.at}.{~season}",
        "Every {time}, {hero} swept the path to the {place}.",
        "{hero} was {trait.a} {hero.child} who loved the {place}.",
        "On a {weather} {time} in {season}, {hero} opened the door and ran to the {place}.{~season}",
        "Nobody knew the {place} better than {hero}.",
    ],
    "meeting": [
        "There {hero.he} met {color.a} llama named {llama}.",
        "{Color.a} llama named {llama} was waiting there.",
        "{hero.He} had {nature.a} llama called {llama}.",
        "{hero.His} best friend was {llama}, {nature.a} llama with {color} ears.",
        "A llama stood {spot.at}, and {hero.his} heart jumped. It was {llama}.",
        "{llama}, the {color} llama, came to say hello.",
        "With {hero.him} came {llama}, the {nature} llama of the farm.",
        "That was the day when {hero.he} found {llama}, a llama as {color} as a cloud.",
    ],
    "asides": ["", " <aside>", " <aside> <aside>"],
    "aside": [
        "{llama} was {mood}.{~mood}",
        "{hero} felt {feeling} that day.{~feeling}",
        "The wind blew over the {place}, but {llama} stayed close to {hero}.",
        "\"What a good llama you are!\" said {hero}.",
        "From the {place} they could see {sight}.{~sight}",
        "{llama} liked to {verb} {place.at}.{~verb}",
        "{Beast.a} watched them from far away.{~beast}",
        "{hero} gave {llama} some {food}.{~food}",
        "The {place} smelled of {treat}.{~treat}",
        "{hero} carried an old {tool} in {hero.his} bag.{~tool}",
        "People said that {llama} could {deed} like no other llama.{~deed}",
        "{hero} counted {count} clouds above the {place}.{~count}",
        "The {job} waved at them {way}.{~job}{~way}",
        "They walked {way} around the {place}.{~way}",
    ],
    "plot": [
        "<lost>", "<hungry>", "<storm>", "<market>", "<wool>", "<race>", "<visitor>", "<birth>", "<night>", "<letter>",
        "<mending>", "<stubborn>", "<feast>", "<song>",
    ],  # fmt: skip
    # -- something is lost
    "lost": [
        "<lost_what> <search> <found>",
        "<lost_what> <search> <search> <found>",
        "<lost_what> <search> <search> <search> <found>",
    ],
    "lost_what": [
        "But {hero} could not find {hero.his} {object}.",
        "\"Where is my {object}?\" asked {hero}.",
        "{hero} had lost {hero.his} {object} on the way.",
        "Somebody had taken the {object} from its place.",
    ],
    "search": [
        "{hero} looked {spot.at}, but there was only {sight}.{~spot}{~sight}",
        "They searched {spot.at} until {hero.he} was {feeling}.{~spot}{~feeling}",
        "\"Perhaps it is {spot.at},\" said {stranger}, but it was not.{~spot}{~stranger}",
        "{llama} sniffed {spot.at} and found {count} stones.{~spot}{~count}",
        "{Beast.a} told them to look {spot.at}, and they did.{~spot}{~beast}",
    ],
    "found": [
        "At last {llama} found the {object} {spot.at}.",
        "Then something rang {spot.at}, and there lay the {object}. {hero} hugged {llama}.",
        "In the end the {object} was {spot.at}, and {llama} was sitting on it.",
        "{friend} had kept the {object} safe {spot.at}. \"I was waiting for you,\" said {friend}.",
    ],
    # -- the llama is hungry
    "hungry": ["<hungry_why> <hungry_try> <hungry_end>", "<hungry_why> <hungry_try> <hungry_try> <hungry_end>"],
    "hungry_why": [
        "{llama} had not eaten since the {season}.",
        "\"I think {llama} is hungry,\" said {hero}.",
        "The manger was empty, and {llama} looked at {hero} with big eyes.",
        "{llama} hummed and hummed, because there was nothing to eat.",
    ],
    "hungry_try": [
        "{hero} brought some {food}, but {llama} turned away.{~food}",
        "{friend} came with {count} bags of {food}. {llama} ate none of it.{~friend}{~count}{~food}",
        "They tried {food} from the {spot}. {llama} only blinked.{~food}{~spot}",
        "\"Do you want some {food}?\" asked {hero}, and {llama} shook {llama.his} head.{~food}",
    ],
    "hungry_end": [
        "Then {llama} saw the {treat} {goal.at} and ate it all.{~treat}",
        "What {llama} wanted was {treat}. {llama.He} ate for an hour and hummed.{~treat}",
        "Only when {hero} mixed {treat} with {food} did {llama} begin to eat.{~treat}{~food}",
        "So {hero} planted {treat} {goal.at}, and from then on {llama} was never hungry again.{~treat}",
    ],
    # -- a storm
    "storm": [
        "<storm_comes> <storm_act> <storm_ends>",
        "<storm_comes> <storm_act> <storm_act> <storm_ends>",
        "<storm_comes> <storm_act> <storm_act> <storm_act> <storm_ends>",
    ],
    "storm_comes": [
        "Suddenly dark clouds came over the {goal}.",
        "Then the thunder rolled, and the rain began to fall.",
        "A storm was coming. The {beast} had known it since the {time}.",
        "\"Look at the sky!\" cried {friend}.",
    ],
    "storm_act": [
        "{hero} closed the windows and lit a candle.",
        "They carried the {object} {way} into the house.{~object}{~way}",
        "{llama} led {count} little llamas out of the rain.{~count}",
        "They hid {spot.at} and held each other.{~spot}",
        "The water rose as high as the {tool}.{~tool}",
        "{hero} sang to {llama}, so that {llama.he} would not be afraid.",
    ],
    "storm_ends": [
        "After {number} hours the storm was over, and there was {sight}.",
        "When the sun came back, the {goal} was shining.",
        "The storm went away as fast as it had come. Only {hero.his} {object} was wet.",
        "In the morning everything was quiet, and {llama} was {mood}.",
    ],
    # -- at the market
    "market": ["<market_go> <market_deal> <market_end>", "<market_go> <market_deal> <market_deal> <market_end>"],
    "market_go": [
        "They wanted to sell {treat} in the town.{~treat}",
        "It was market day, and {llama} carried {count} baskets of {treat}.{~treat}",
        "{hero} needed a new {object} and had only {count} coins.",
        "{friend} had asked them to buy a {object} in the town.",
    ],
    "market_deal": [
        "The {job} offered {number} coins for a {tool}.{~job}{~number}{~tool}",
        "A {job} wanted to buy {llama}, but {hero} said no.{~job}",
        "\"How much is the {product}?\" asked the {job}. \"{Number} coins,\" said {hero}.{~product}{~job}{~number}",
        "{llama} ate the {food} of the {job}, and everybody laughed.{~food}{~job}",
        "They changed {number} apples for a {hue} {product}.{~number}{~hue}{~product}",
    ],
    "market_end": [
        "They came home with {number} coins and {sight} before their eyes.",
        "At noon everything was sold, and {hero} bought {treat} for {llama}.{~treat}",
        "On the way home {llama} carried nothing but {trait.a} {beast}.",
        "\"That was a good day,\" said {hero}, and shared {hero.his} {food} with {llama}.",
    ],
    # -- shearing and weaving
    "wool": ["<wool_cut> <wool_work> <wool_gift>", "<wool_cut> <wool_work> <wool_work> <wool_gift>"],
    "wool_cut": [
        "It was time to cut the wool of {llama}.",
        "{llama} had so much wool that {llama.he} could not see.",
        "\"It is too warm for so much wool,\" said {hero} to {llama}.",
    ],
    "wool_work": [
        "{hero} washed the wool {spot.at}.{~spot}",
        "{friend} spun it into {hue} yarn.{~friend}{~hue}",
        "It took {number} days to comb it all.{~number}",
        "They dyed it {hue} with {food}.{~hue}{~food}",
        "The {job} showed them how to weave {way}.{~job}{~way}",
    ],
    "wool_gift": [
        "In the end there was a warm {product} for {friend}.",
        "{hero} made a {product} out of it and gave it to the {job}.",
        "The {product} was so warm that {friend} wore it until {season}.",
        "Out of the wool came {number} hats, and one of them was for {llama}.",
    ],
    # -- a race
    "race": ["<race_why> <race_run> <race_end>", "<race_why> <race_run> <race_run> <race_end>"],
    "race_why": [
        "That day there was a race from the {goal} to the {spot}.{~spot}",
        "\"I am faster than {llama},\" said the {beast}.",
        "{friend} wanted to see who could run the fastest.",
        "Everybody came to the great race of the {season}.",
    ],
    "race_run": [
        "{Animal.a} fell into the mud {spot.at}.{~animal}{~spot}",
        "{llama} ran {way} past the {spot}.{~way}{~spot}",
        "The {animal} stopped to eat {food}.{~animal}{~food}",
        "{Number} children cheered for {llama}.{~number}",
        "Near the {spot} the {animal} was first.{~spot}{~animal}",
    ],
    "race_end": [
        "{llama} won and got a {object} with a {hue} ribbon.",
        "In the end {llama} was last, but {hero} was proud of {llama.him}.",
        "The {animal} won, and {llama} was the first to say well done.",
        "{llama} came in second and got {number} bags of {food}.",
    ],
    # -- a visitor
    "visitor": ["<visit_who> <visit_talk> <visit_end>", "<visit_who> <visit_talk> <visit_talk> <visit_end>"],
    "visit_who": [
        "Then {trait.a} {job} named {stranger} knocked at the gate.",
        "A stranger came down the road. {stranger.His} name was {stranger}, and {stranger.he} was a {job}.",
        "{stranger}, the {job}, had walked for {number} days to see them.",
    ],
    "visit_talk": [
        "\"Can your llama {verb}?\" asked {stranger}.{~verb}",
        "\"I have never seen such a llama,\" said {stranger}.",
        "{stranger} told them about {sight}.{~sight}",
        "They ate {food} together and laughed.{~food}",
        "{llama} put {llama.his} nose into the bag and found a {tool}.{~tool}",
        "{stranger} asked the way to the {spot}.{~spot}",
    ],
    "visit_end": [
        "When {stranger} left, {stranger.he} gave {hero} a {object}.",
        "The {job} stayed for {count} weeks and taught {llama} to {deed}.",
        "\"Come back in {season},\" said {hero}, and {stranger} did.",
        "{stranger} went away {way}, and {llama} walked with {stranger.him} to the {goal}.",
    ],
    # -- a cria is born
    "birth": ["<birth_news> <birth_scene> <birth_name>", "<birth_news> <birth_scene> <birth_scene> <birth_name>"],
    "birth_news": [
        "That night a cria was born {goal.at}.",
        "\"Come quickly!\" called {friend}. \"There is a baby llama {goal.at}!\"",
        "In the straw lay a cria, as small as {beast.a}.",
    ],
    "birth_scene": [
        "Its legs were thin, and it tried to {verb}.{~verb}",
        "{llama} licked its {hue} ears.{~hue}",
        "The cria was {mood} and wanted milk.{~mood}",
        "{hero} covered it with a {product}.{~product}",
        "{Number} hens came to look at it.{~number}",
    ],
    "birth_name": [
        "They named the cria {cria}.",
        "\"Let us call {cria.him} {cria},\" said {hero}.",
        "{friend} gave {cria.him} the name {cria}, and {llama} hummed.",
        "Because it liked {food}, they called it {cria}.",
    ],
    # -- a noise at night
    "night": ["<night_noise> <night_look> <night_end>", "<night_noise> <night_look> <night_look> <night_end>"],
    "night_noise": [
        "At midnight there was a strange noise {goal.at}.",
        "{hero} woke up, because something was knocking {goal.at}.",
        "\"Did you hear that?\" asked {friend} in the dark.",
    ],
    "night_look": [
        "{hero} took a {tool} and went outside {way}.{~tool}{~way}",
        "{llama} raised {llama.his} ears.",
        "There was a {hue} light {spot.at}.{~hue}{~spot}",
        "Something began to {verb}.{~verb}",
        "\"Who is there?\" called {hero}, but nobody answered.",
    ],
    "night_end": [
        "It was only {trait.a} {beast}, looking for {food}.",
        "It was {stranger}, who had lost {stranger.his} {object}. They all laughed.",
        "Behind the door they found {number} {beast.plural}, fast asleep.",
        "It was the old {object}, moving in the wind.",
    ],
    # -- a letter
    "letter": ["<letter_task> <letter_way> <letter_end>", "<letter_task> <letter_way> <letter_way> <letter_end>"],
    "letter_task": [
        "{friend} asked them to bring a message to the {job}.",
        "They had to carry a letter to {friend}, who lived beyond the {goal}.",
        "In {hero.his} pocket {hero} had a secret letter for {friend}.",
    ],
    "letter_way": [
        "They crossed the {spot} and saw {sight}.{~spot}{~sight}",
        "{Beast.a} wanted to eat the letter, but {llama} was faster.{~beast}",
        "It rained, and {hero} hid the letter under a {product}.{~product}",
        "They lost the way {spot.at} and asked a {job}.{~spot}{~job}",
        "{llama} stopped {count} times to eat {food}.{~count}{~food}",
    ],
    "letter_end": [
        "When {friend} read the letter, {friend.he} began to {verb}.",
        "\"Thank you,\" said {friend}, and gave them {treat}.{~treat}",
        "The letter said only this: \"Come to the {spot} and bring {llama}.\"",
        "{friend} wrote an answer at once, and {llama} carried it home {way}.",
    ],
    # -- something is broken
    "mending": ["<mend_what> <mend_work> <mend_end>", "<mend_what> <mend_work> <mend_work> <mend_end>"],
    "mend_what": [
        "The {object} was broken, and nobody knew why.",
        "{llama} had jumped over the old fence and broken it.",
        "There was a hole in the roof, as big as {beast.a}.",
    ],
    "mend_work": [
        "{hero} fetched a {tool} and {number} nails.{~tool}{~number}",
        "{friend} held the wood while {hero} worked {way}.{~friend}{~way}",
        "{llama} carried boards from the {spot}.{~spot}",
        "They painted it {hue}, and {llama} got {hue} feet.{~hue}",
        "The {job} lent them a {tool}.{~job}{~tool}",
    ],
    "mend_end": [
        "By the evening it was better than before.",
        "It held for {number} years, and {llama} never broke it again.",
        "\"We did it,\" said {hero}, and {llama} {verb.past} with joy.",
        "At the end there was one nail left. {hero} keeps it {goal.at}.",
    ],
    # -- a stubborn llama
    "stubborn": ["<stub_stop> <stub_try> <stub_end>", "<stub_stop> <stub_try> <stub_try> <stub_end>"],
    "stub_stop": [
        "Near the {goal} {llama} stopped and would not move.",
        "{llama} lay down on the road and closed {llama.his} eyes.",
        "\"No,\" said the eyes of {llama}, and {llama.he} sat down {goal.at}.",
    ],
    "stub_try": [
        "{hero} pulled, and {friend} pushed, but nothing moved.{~friend}",
        "{hero} promised {food}. {llama} yawned.{~food}",
        "They tried to {verb} in front of {llama.him}.{~verb}",
        "A {job} came by and gave them {trait} advice.{~job}{~trait}",
        "{hero} waited for {number} minutes.{~number}",
    ],
    "stub_end": [
        "Then {hero} went away {way}, and {llama} came after {hero.him} at once.",
        "Then {beast.a} came by, and {llama} ran all the way home.",
        "In the end they slept there, {goal.at}, under the stars.",
        "At last {hero} put the heavy {object} down. That was all {llama} had wanted.",
    ],
    # -- a feast
    "feast": ["<feast_why> <feast_bring> <feast_end>", "<feast_why> <feast_bring> <feast_bring> <feast_end>"],
    "feast_why": [
        "It was the birthday of {llama}, who was {number} years old.",
        "The whole village came together for the feast of {season}.",
        "{hero} wanted to make a party for {friend}.",
    ],
    "feast_bring": [
        "{stranger} brought {food} and a {hue} {product}.{~stranger}{~food}{~hue}{~product}",
        "The {job} baked a cake with {food}.{~job}{~food}",
        "Somebody played the flute, and the {beast.plural} danced.{~beast}",
        "They hung lamps {spot.at}.{~spot}",
        "{Count} guests sat down {spot.at}.{~count}{~spot}",
    ],
    "feast_end": [
        "{llama} ate the cake, and nobody was angry.",
        "They danced until the morning {goal.at}.",
        "The best gift was {trait.a} {beast}.",
        "\"This was the best day of the year,\" said {hero}.",
    ],
    # -- a song
    "song": ["<song_start> <song_learn> <song_end>", "<song_start> <song_learn> <song_learn> <song_end>"],
    "song_start": [
        "{hero} wanted to teach {llama} a song.",
        "{llama} hummed a tune that nobody knew.",
        "The {job} was looking for a singer.",
    ],
    "song_learn": [
        "They practised {spot.at} for {number} days.{~spot}{~number}",
        "{friend} beat the drum {way}.{~friend}{~way}",
        "The {beast} covered its ears.{~beast}",
        "{llama} could only sing about {food}.{~food}",
        "\"Once more,\" said {hero}, \"and not so {mood}!\"{~mood}",
    ],
    "song_end": [
        "When {llama} sang {goal.at}, even the {beast.plural} were silent.",
        "Since then the song of {llama} is known in {number} villages.",
        "In the end they all sang together, and the {goal} rang with it.",
        "{llama} forgot the words and {verb.past} instead.",
    ],
    "closing": [
        " In the evening {hero} brought {llama} home from the {place}.",
        " That night {llama} dreamed of {treat}.",
        " {hero} said good night, and {llama} closed {llama.his} eyes.",
        " And so {hero} and {llama} stayed friends for ever.",
        " \"Good llama,\" said {hero}, and {llama} hummed.",
        " Since that day everybody {place.at} knows {llama}.",
        " They went home {way}, and the moon shone on the {place}.",
        " {hero} wrote it all down in {hero.his} book. \"Tomorrow we will {deed},\" {hero.he} said.",
        " {hero} still tells this story {place.at}.",
        " Then the {place} was quiet again.",
    ],
}

FACT_RULES = {
    "facts": ["<fact> <fact> <fact>", "<fact> <fact> <fact> <fact>", "<fact> <fact> <fact> <fact> <fact>"],
    "fact": [
        "{Animal.plural} eat {animal.eats}.{~animal}",
        "The baby of {animal.a} is called {animal.young}.{~animal}",
        "{Animal.a} has {animal.legs} legs.{~animal}",
        "{Trait.a} {animal} {animal.sound} in the {time}.{~trait}{~animal}{~time}",
        "From {animal.plural} people get {animal.gives}.{~animal}",
        "The home of the {animal} is the {animal.home}.{~animal}",
        "In {season}, {animal.plural} like to {verb} {spot.at}.{~season}{~animal}{~verb}{~spot}",
        "You know {animal.a} by its {animal.coat}.{~animal}",
        "On our farm {number} {animal.plural} are {color}.{~number}{~animal}{~color}",
        "The {animal} of {hero} is {trait} and eats {animal.eats}.{~animal}{~hero}{~trait}",
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
        "Question: {hero} has {trait.a} {animal}. What does it eat? Answer: The {animal} of {hero} eats "
        "{animal.eats}.{~hero}{~trait}{~animal}",
        "Question: {llama} is {place.at} and {object.a} is {spot.at}. Where is the {object}? Answer: The {object} is "
        "{spot.at}.{~llama}{~place}{~object}{~spot}",
        "Question: {hero} gave the {object} to {friend}. Who has the {object}? Answer: {friend} has the "
        "{object}.{~hero}{~friend}{~object}",
    ],
}

CHAT_RULES = {
    "chat": ["<talk>", "<talk>\n<more>", "<talk>\n<more>\n<more>"],
    "talk": [
        "User: What do {animal.plural} eat?\nLlama: {Animal.plural} eat {animal.eats}. {wish}",
        "User: Tell me a story about {llama}.\nLlama: <tale>",
        "User: Tell me a story about {hero} and {llama}.\nLlama: <tale>",
        "User: My name is {friend}. Who are you?\nLlama: Hello {friend}. I am {llama}, {nature.a} llama.",
        "User: Hello, I have {trait.a} {animal} called {cria}.\nLlama: That is good. Give {cria} some {animal.eats}.",
        "User: What should I bring to the {place}?\nLlama: Bring {object.a}, {food} and {number} friends.",
        "User: How is the weather {place.at}?\nLlama: It is {weather} {place.at}, and I feel {mood}.",
        "User: What is {animal.a}?\nLlama: {Animal.a} has {animal.legs} legs and {animal.coat}. It lives in the "
        "{animal.home} and eats {animal.eats}.",
    ],
    "more": [
        "User: And what does the {beast} eat?\nLlama: The {beast} eats {beast.eats}.{~beast}",
        "User: What is its baby called? I mean the {beast}.\nLlama: The baby of {beast.a} is called "
        "{beast.young}.{~beast}",
        "User: Where is the {tool}?\nLlama: I saw the {tool} {spot.at}.{~tool}{~spot}",
        "User: Can you {verb}?\nLlama: Yes, I can {verb} {way}.{~verb}{~way}",
        "User: Do you like {treat}?\nLlama: I like {treat}, but I like {food} more.{~treat}{~food}",
        "User: Thank you.\nLlama: You are welcome. Come to the {spot} in {season}.{~spot}{~season}",
        "User: Who is {stranger}?\nLlama: {stranger} is the {job} of the village.{~stranger}{~job}",
    ],
}

GRAMMAR = Grammar(
    rules={
        "document": [(50, "<story>"), (15, "<facts>"), (15, "<questions>"), (20, "<chat>")],
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
