"""Write the digit-scene data set: images, JSONL files and a tokenizer.

    python tools/make_digits.py --out runs/demo/data --grid 3 --images 6000 --seed 1

align.jsonl (only transcribe), mix.jsonl (all skills) and rl.jsonl (questions with answers of any
form) show training scans; valid.jsonl shows only held-out scans. The same arguments always write
the same files.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from examples.digits.scenes import DEFAULT_WEIGHTS, FREE_KEYS, PHRASES, Row, ask, load_scans, render
from megatron_mm.data.tokenizer import Tokenizer, train_sentencepiece

TOKENIZER_SAMPLE = 5000  # rows that train the tokenizer; they contain every wording


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--grid", type=int, choices=(3, 4), default=3, help="cells along a side")
    parser.add_argument("--images", type=int, default=6000, help="training images")
    parser.add_argument("--valid-images", type=int, default=1000, help="validation images")
    parser.add_argument("--align-per-image", type=int, default=3, help="rows of align.jsonl each")
    parser.add_argument("--mix-per-image", type=int, default=8, help="rows of mix.jsonl each")
    parser.add_argument("--rl-per-image", type=int, default=3, help="rows of rl.jsonl each")
    parser.add_argument("--valid-per-key", type=int, default=500, help="rows per skill and form")
    parser.add_argument("--jitter", type=int, default=0, help="largest shift of a digit, pixels")
    parser.add_argument("--vocab-size", type=int, default=448, help="most tokens, x64 for speed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--weights",
        nargs="*",
        default=[],
        metavar="KEY=NUMBER",
        help=f"share of a key in mix.jsonl, e.g. ocr/steps=2; default {DEFAULT_WEIGHTS}",
    )
    args = parser.parse_args(argv)
    numbers = ("images", "valid_images", "align_per_image", "mix_per_image", "rl_per_image")
    for name in (*numbers, "valid_per_key"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; at least 1")
    if not 0 <= args.jitter < 8:
        parser.error(f"--jitter is {args.jitter}; a cell of 16 pixels allows 0 to 7")
    weights = dict(DEFAULT_WEIGHTS)
    for item in args.weights:
        key, _, number = item.partition("=")
        try:
            weights[key] = float(number)
        except ValueError:
            parser.error(f"--weights {item!r} is not KEY=NUMBER")
        if key not in DEFAULT_WEIGHTS or weights[key] < 0:
            parser.error(f"--weights {item!r}: keys are {', '.join(DEFAULT_WEIGHTS)}, numbers >= 0")
    if not sum(weights.values()):
        parser.error("--weights are all 0")
    args.weights = weights
    return args


def write_scenes(args: argparse.Namespace, held_out: bool, count: int) -> list[tuple[str, list]]:
    """Writes `count` images. Returns their relative paths and the digits of their cells."""
    scans, targets = load_scans(held_out)
    name = "valid" if held_out else "train"
    rng = np.random.default_rng([args.seed, int(held_out)])
    cells = args.grid**2
    scenes = []
    for number in range(count):
        chosen = rng.integers(len(scans), size=cells)
        shifts = rng.integers(-args.jitter, args.jitter + 1, size=(cells, 2))
        path = f"images/{name}_{number:06d}.png"
        image = Image.fromarray(render(scans, chosen, args.grid, shifts))
        image.save(args.out / path, compress_level=1)
        scenes.append((path, [int(digit) for digit in targets[chosen]]))
    return scenes


def images_of(scenes: list[tuple[str, list]], number: int) -> dict[str, list[str]]:
    """Returns the image of a scene, and that of the next for the control that looks at another."""
    return {"images": [scenes[number][0]], "other_images": [scenes[(number + 1) % len(scenes)][0]]}


def questions(
    scenes: list[tuple[str, list]], keys: list[str], per_scene: int, grid: int, rng: Random
) -> list[Row]:
    """Asks `per_scene` questions about each scene, taking `keys` in turn."""
    rows, turn = [], 0
    for number, (_, digits) in enumerate(scenes):
        for _ in range(per_scene):
            row = ask(keys[turn % len(keys)], digits, grid, rng)
            turn += 1
            if row is not None:
                rows.append(row | images_of(scenes, number))
    return rows


def valid_questions(
    scenes: list[tuple[str, list]], per_key: int, grid: int, rng: Random
) -> list[Row]:
    """Asks `per_key` questions of every key, in turn, so that any prefix of the file is balanced.
    All forms of a skill ask the same questions, so they can be paired."""
    rows = []
    seeds = {skill.split("/")[0]: rng.random() for skill in DEFAULT_WEIGHTS}
    for number in range(per_key):
        for key in DEFAULT_WEIGHTS:
            row, attempt, seed = None, 0, f"{seeds[key.split('/')[0]]} {number}"
            while row is None:  # if a scene allows no hop, the next one is tried
                scene = (number + attempt * 7919) % len(scenes)
                row = ask(key, scenes[scene][1], grid, Random(seed))
                attempt += 1
                if attempt > 10 * len(scenes):
                    raise SystemExit(f"no scene allows a {key} question; raise --valid-images")
            rows.append(row | images_of(scenes, scene))
    return rows


def write_jsonl(path: Path, rows: list[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{path}: {len(rows)} rows")


def train_tokenizer(args: argparse.Namespace, rows: list[Row]) -> Tokenizer:
    sample = Random(args.seed).sample(rows, min(TOKENIZER_SAMPLE, len(rows)))
    texts = [m["content"].replace("<image>", "") for row in sample for m in row["messages"]]
    return train_sentencepiece(texts, args.out / "tokenizer.model", args.vocab_size, PHRASES)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    train = write_scenes(args, held_out=False, count=args.images)
    held_out = write_scenes(args, held_out=True, count=args.valid_images)
    rng = Random(args.seed)
    reading = ["transcribe", "transcribe/steps"]
    align = questions(train, reading, args.align_per_image, args.grid, rng)
    draws = args.images * args.mix_per_image
    keys = rng.choices(list(args.weights), weights=list(args.weights.values()), k=draws)
    mix = questions(train, keys, args.mix_per_image, args.grid, rng)
    free = questions(train, list(FREE_KEYS), args.rl_per_image, args.grid, rng)
    valid = valid_questions(held_out, args.valid_per_key, args.grid, rng)
    for name, rows in (("align", align), ("mix", mix), ("rl", free), ("valid", valid)):
        write_jsonl(args.out / f"{name}.jsonl", rows)
    tokenizer = train_tokenizer(args, align + mix)
    print(
        f"{args.out / 'tokenizer.model'}: {tokenizer.vocab_size} tokens, set vocab_size to "
        f"{tokenizer.padded_vocab_size()}"
    )
    counts = Counter(row["skill"] for row in mix)
    print("mix:", ", ".join(f"{skill} {count}" for skill, count in counts.most_common()))


if __name__ == "__main__":
    main()
