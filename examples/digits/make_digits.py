"""Write the digit-scene data set: images, JSONL files and a tokenizer.

    python tools/make_digits.py --out runs/demo/data --grid 3 --images 6000 --seed 1
    python tools/make_digits.py --out runs/wide --scenes wide --one multihop/free --beyond 500

align.jsonl (only reading), mix.jsonl (all skills) and rl.jsonl (questions with answers of any form)
show training scans; valid.jsonl shows only held-out scans. `--one` adds rl_one.jsonl, the rows of
rl.jsonl of one kind. `--beyond` adds what no training row shows: valid_larger.jsonl, scenes with a
row and a column more, and valid_longer.jsonl, one hop more. The answers of `--scenes looking` look
at the cells that they read; *_plain.jsonl are the same rows without looks, *_tenth.jsonl have boxes
in every tenth row. The same arguments always write the same files.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from examples.digits.asking import Row, Scenes, load_scans
from examples.digits.looking import LOOKING, without_boxes, without_looks
from examples.digits.scenes import DIGITS
from examples.digits.wide import WIDE
from megatron_mm.data.tokenizer import Tokenizer, train_sentencepiece
from megatron_mm.evaluation.scoring import result_key

SCENES = {"digits": DIGITS, "wide": WIDE, "looking": LOOKING}
TENTH = 10  # rows of which one has boxes in mix_tenth.jsonl
TOKENIZER_SAMPLE = 5000  # rows that train the tokenizer; they contain every wording


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--scenes", choices=SCENES, default="digits", help="their kind")
    parser.add_argument(
        "--grid", type=int, choices=(3, 4, 5, 6), default=3, help="cells along a side"
    )
    parser.add_argument("--images", type=int, default=6000, help="training images")
    parser.add_argument("--valid-images", type=int, default=1000, help="validation images")
    parser.add_argument("--align-per-image", type=int, default=3, help="rows of align.jsonl each")
    parser.add_argument("--mix-per-image", type=int, default=8, help="rows of mix.jsonl each")
    parser.add_argument("--rl-per-image", type=int, default=3, help="rows of rl.jsonl each")
    parser.add_argument("--valid-per-key", type=int, default=500, help="rows per skill and form")
    parser.add_argument("--jitter", type=int, default=0, help="largest shift of a digit, pixels")
    parser.add_argument("--vocab-size", type=int, help="most tokens; default the scenes'")
    parser.add_argument("--one", metavar="KEY", help="write rl_one.jsonl, of this kind alone")
    parser.add_argument("--beyond", type=int, default=0, help="rows per key out of distribution")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--weights",
        nargs="*",
        default=[],
        metavar="KEY=NUMBER",
        help=f"share of a key in mix.jsonl, e.g. ocr/steps=2; digits: {dict(DIGITS.weights)}",
    )
    args = parser.parse_args(argv)
    numbers = ("images", "valid_images", "align_per_image", "mix_per_image", "rl_per_image")
    for name in (*numbers, "valid_per_key"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; at least 1")
    if not 0 <= args.jitter < 8:
        parser.error(f"--jitter is {args.jitter}; a cell of 16 pixels allows 0 to 7")
    if args.beyond < 0:
        parser.error(f"--beyond is {args.beyond}; at least 0")
    scenes = SCENES[args.scenes]
    if args.one is not None and args.one not in scenes.free_keys:
        parser.error(f"--one {args.one}: the kinds are {', '.join(scenes.free_keys)}")
    weights = dict(scenes.weights)
    for item in args.weights:
        key, _, number = item.partition("=")
        try:
            weights[key] = float(number)
        except ValueError:
            parser.error(f"--weights {item!r} is not KEY=NUMBER")
        if key not in scenes.weights or weights[key] < 0:
            parser.error(f"--weights {item!r}: keys are {', '.join(scenes.weights)}, numbers >= 0")
    if not sum(weights.values()):
        parser.error("--weights are all 0")
    args.weights = weights
    return args


def write_scenes(
    args: argparse.Namespace, name: str, stream: int, grid: int, count: int
) -> list[tuple[str, list]]:
    """Writes `count` images, of held-out scans unless `name` is train. Returns their relative paths
    and the content of their cells.

    Args:
        stream: of random numbers, one for each set of images.
    """
    scans = load_scans(held_out=name != "train")
    rng = np.random.default_rng([args.seed, stream])
    scenes = []
    for number in range(count):
        picture, cells = SCENES[args.scenes].draw(scans, grid, args.jitter, rng)
        path = f"images/{name}_{number:06d}.png"
        Image.fromarray(picture).save(args.out / path, compress_level=1)
        scenes.append((path, cells))
    return scenes


def images_of(scenes: list[tuple[str, list]], number: int) -> dict[str, list[str]]:
    """Returns the image of a scene, and that of the next for the control that looks at another."""
    return {"images": [scenes[number][0]], "other_images": [scenes[(number + 1) % len(scenes)][0]]}


def questions(
    kind: Scenes,
    scenes: list[tuple[str, list]],
    keys: Sequence[str],
    per_scene: int,
    grid: int,
    rng: Random,
) -> list[Row]:
    """Asks `per_scene` questions about each scene, taking `keys` in turn."""
    rows, turn = [], 0
    for number, (_, cells) in enumerate(scenes):
        for _ in range(per_scene):
            row = kind.ask(keys[turn % len(keys)], cells, grid, rng)
            turn += 1
            if row is not None:
                rows.append(row | images_of(scenes, number))
    return rows


def valid_questions(
    kind: Scenes,
    scenes: list[tuple[str, list]],
    keys: Sequence[str],
    per_key: int,
    grid: int,
    rng: Random,
    longer: bool = False,
) -> list[Row]:
    """Asks `per_key` questions of every key, in turn, so that any prefix of the file is balanced.
    All forms of a skill ask the same questions, so they can be paired."""
    rows = []
    seeds = {skill.split("/")[0]: rng.random() for skill in keys}
    for number in range(per_key):
        for key in keys:
            row, attempt, seed = None, 0, f"{seeds[key.split('/')[0]]} {number}"
            while row is None:  # if a scene allows no hop, the next one is tried
                scene = (number + attempt * 7919) % len(scenes)
                row = kind.ask(key, scenes[scene][1], grid, Random(seed), longer)
                attempt += 1
                if row is None and attempt > 10 * len(scenes):
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
    kind = SCENES[args.scenes]
    size = kind.vocabulary if args.vocab_size is None else args.vocab_size
    return train_sentencepiece(texts, args.out / "tokenizer.model", size, kind.phrases)


def beyond(args: argparse.Namespace, held_out: list[tuple[str, list]]) -> dict[str, list[Row]]:
    """Asks what no training row shows: about scenes with a row and a column more, and a hop more
    about scenes of the usual size."""
    kind, grid = SCENES[args.scenes], args.grid + 1
    larger = write_scenes(args, "larger", 2, grid, len(held_out))
    hops = [key for key in kind.weights if key.partition("/")[0] == "multihop"]
    rng, count = Random(f"{args.seed} beyond"), args.beyond
    return {
        "valid_larger": valid_questions(kind, larger, list(kind.weights), count, grid, rng),
        "valid_longer": valid_questions(kind, held_out, hops, count, args.grid, rng, longer=True),
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    kind = SCENES[args.scenes]
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    train = write_scenes(args, "train", 0, args.grid, args.images)
    held_out = write_scenes(args, "valid", 1, args.grid, args.valid_images)
    rng = Random(args.seed)
    align = questions(kind, train, kind.reading, args.align_per_image, args.grid, rng)
    draws = args.images * args.mix_per_image
    keys = rng.choices(list(args.weights), weights=list(args.weights.values()), k=draws)
    mix = questions(kind, train, keys, args.mix_per_image, args.grid, rng)
    asked = kind.free_keys or list(kind.weights)
    free = questions(kind, train, asked, args.rl_per_image, args.grid, rng)
    valid = valid_questions(kind, held_out, list(kind.weights), args.valid_per_key, args.grid, rng)
    files = {"align": align, "mix": mix, "rl": free, "valid": valid}
    if args.one is not None:
        files["rl_one"] = [row for row in free if result_key(row) == args.one]
    if args.beyond:
        files |= beyond(args, held_out)
    if kind is LOOKING:
        files |= {f"{name}_plain": [*map(without_looks, files[name])] for name in ("align", "mix")}
        files |= {f"{name}_tenth": without_boxes(files[name], TENTH) for name in ("align", "mix")}
    for name, rows in files.items():
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
