"""Questions and answers about a scene, and the words they are made of."""

from typing import NamedTuple

import numpy as np

from efficient_vlm.data.scenes import ALPHABET, COLOURS, MAX_GRID, NEEDLES, Scene, SceneConfig


class Question(NamedTuple):
    """One question; the answer is one word, or for "dense" single characters with spaces."""

    task: str
    prompt: str
    answer: str


def vocabulary() -> list[str]:
    """Every word that can occur in a question or an answer, in a fixed order.

    It does not depend on the settings, so a model trained on some tasks can be tested on others.
    """
    wording = (
        "which digit is how many what row column background colour "
        "left of above there a read the text yes no"
    )
    numbers = [str(i) for i in range(MAX_GRID)]
    letters = [c for c in ALPHABET if not c.isdigit()]
    return [*numbers, *COLOURS, *wording.split(), *letters]


def longest(config: SceneConfig) -> int:
    """The largest number of words of a question with its answer."""
    words = {"needle": 5, "needle_hr": 5, "count": 4, "point": 5, "global": 4}
    words |= {"relation": 6, "absent": 6, "dense": 3 + config.dense_length}
    return max(words[task] for task in config.tasks)


def draw(scene: Scene, config: SceneConfig, rng: np.random.Generator) -> list[Question]:
    """Draws `config.question_pool` questions in random order, with tasks as evenly as possible.

    Colours are dealt like cards: an image repeats a question only after every colour had its turn.
    "relation" and "absent" draw the answer first, so yes and no are equally likely for every colour
    that is named.
    """
    pool = config.question_pool
    # A random order, so that the tasks that get one question more are random, too.
    order = rng.permutation(len(config.tasks))
    tasks = [config.tasks[order[i % len(order)]] for i in range(pool)]
    colours = scene.glyphs[:, 4]
    needles = rng.permutation(NEEDLES)
    several = rng.permutation(len(scene.several))
    deal = dict.fromkeys(config.tasks, 0)
    questions = []
    for task in tasks:
        turn = deal[task]
        deal[task] += 1
        if task in ("needle", "needle_hr"):
            which = needles[turn % NEEDLES]
            question = f"which digit is {COLOURS[colours[which]]}", str(scene.glyphs[which, 5])
        elif task == "point":
            # From the other end than "needle", so that the two ask about different colours.
            which = needles[-1 - turn % NEEDLES]
            axis = int(rng.integers(2))
            name = ("row", "column")[axis]
            question = f"what {name} is {COLOURS[colours[which]]}", str(scene.glyphs[which, axis])
        elif task == "count":
            colour = scene.several[several[turn % len(several)]]
            question = f"how many {COLOURS[colour]}", str(int((colours == colour).sum()))
        elif task == "global":
            question = "what background colour", COLOURS[scene.background]
        elif task == "dense":
            question = "read the text", " ".join(scene.text)
        elif task == "absent":
            question = _absent(colours, rng)
        else:
            question = _relation(scene, rng)
        questions.append(Question(task, *question))
    return [questions[i] for i in rng.permutation(pool)]


def _absent(colours: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    """Asks whether a colour occurs; the answer is drawn first, and one colour never occurs."""
    yes = bool(rng.integers(2))
    present = np.isin(np.arange(len(COLOURS)), colours)
    options = np.flatnonzero(present == yes)
    return f"is there a {COLOURS[rng.choice(options)]} digit", "yes" if yes else "no"


def _relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Asks whether one needle is left of, or above, another; the answer is drawn first."""
    preferred, yes = int(rng.integers(2)), bool(rng.integers(2))
    cells = scene.glyphs[:NEEDLES, :2]
    # Five different cells cannot agree in both coordinates, so one of the axes has a pair.
    for axis in (preferred, 1 - preferred):
        first, second = np.nonzero(cells[:, axis][:, None] < cells[:, axis][None])
        if len(first):
            break
    pick = int(rng.integers(len(first)))
    names = [COLOURS[scene.glyphs[k[pick], 4]] for k in (first, second)]
    if not yes:
        names.reverse()
    return f"is {names[0]} {('above', 'left of')[axis]} {names[1]}", "yes" if yes else "no"
