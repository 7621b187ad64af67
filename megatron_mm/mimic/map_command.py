"""Map a teacher's layers and experts to a student's, as mimic learning reads them.

    python tools/map_experts.py --routes routes.st --checkpoint runs/sft --data train.jsonl \\
        --out map.st
    python tools/map_experts.py --method clusters --routes routes.st --config mine.yaml --out map.st
    python tools/map_experts.py --method skills --routes routes.st --checkpoint runs/sft \\
        --data train.jsonl --skill-maps teacher.json student.json --out map.st

`transport` compares both models on recorded rows and moves the teacher's load onto the student's by
what is chosen together: for a student that is trained already. `clusters` groups the teacher's
experts into as many sets as the student has: for a student from scratch, whose settings --config
and training's flags give. `skills` goes through two skill maps (tools/discover_experts.py). With
--checkpoint layers are matched by what their routers do, else by depth. Runs on any layout.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_mm import cli
from megatron_mm.config import ConfigError
from megatron_mm.earl.stored_run import check_flags, stored_run
from megatron_mm.outputs import check_writable

METHODS = ("transport", "clusters", "skills")


def settings(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns (this tool's flags, the run's flags).

    Raises:
        ConfigError: a flag is unknown, or one that the method needs is missing.
    """
    parser = cli.Parser(__doc__)
    parser.add_argument("--routes", type=cli.path, required=True, help="tools/record_routes.py's")
    parser.add_argument("--out", type=cli.path, required=True, help="the file to write")
    parser.add_argument("--method", choices=METHODS, default="transport")
    parser.add_argument("--checkpoint", type=cli.path, help="of the student")
    parser.add_argument("--data", nargs="+", help="recorded rows that both are compared on")
    parser.add_argument("--config", help="with clusters or skills: of a student from scratch")
    parser.add_argument("--layers", type=int, nargs="+", help="that learn; default: all")
    parser.add_argument(
        "--skill-maps", type=cli.path, nargs=2, metavar=("TEACHER", "STUDENT"), help="with skills"
    )
    parser.add_argument("--samples", type=int, help="at most this many rows; default: all")
    parser.add_argument("--batch-size", type=int, help="rows read together; default: 16")
    args, rest = parser.parse_known_args(argv)
    for name in ("samples", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"{cli.flag(name)} is {value}; allowed: 1 or more")
    if (args.checkpoint is None) != (args.data is None):
        raise ConfigError("--checkpoint and --data go together: the student, and recorded rows")
    reads = args.checkpoint is not None
    for name, used in (("samples", reads or args.method == "clusters"), ("batch_size", reads)):
        if getattr(args, name) is not None and not used:
            raise ConfigError(
                f"{cli.flag(name)} is {getattr(args, name)}; allowed: this value with --checkpoint"
            )
    if args.method == "transport" and args.checkpoint is None:
        raise ConfigError("--method transport needs --checkpoint and --data: a trained student")
    if (args.method == "skills") != (args.skill_maps is not None):
        raise ConfigError("--skill-maps and --method skills go together")
    if args.checkpoint is not None:
        if args.config is not None:
            raise ConfigError("--config is not for a student with a --checkpoint")
        check_flags(rest, "mapping")
    return args, rest


def main(argv: list[str]) -> int:
    """Returns the exit code: 0; 1 if a file cannot be used; 2 for wrong settings."""
    from megatron_mm.checkpoint.command import CheckpointCommand

    with CheckpointCommand() as command:
        args, rest = settings(argv)
        if cli.rank() == 0:
            check_writable(args.out, "--out")  # better refused now than after the survey
        said = _map(args, rest, command)
        if cli.rank() == 0:
            cli.say(said)
    return command.status


def _map(args: argparse.Namespace, rest: list[str], command: Any) -> str:
    from megatron_mm.config import effective_pattern, hops, load, num_layers
    from megatron_mm.mimic.make_map import Student, make_map, routed_together
    from megatron_mm.mimic.route_file import RouteFile

    routes = RouteFile(args.routes)
    stored: Any = None
    if args.checkpoint is not None:
        args.checkpoint, stored = command.resolve(args.checkpoint)
        run = stored_run(stored["config"], rest, cli.world_size(), None)
    else:
        run = load(args.config, rest)
    pattern, experts = effective_pattern(run.model), run.model.language.num_experts
    known = [*hops(run.model)]
    taught = known if args.layers is None else args.layers
    odd = [layer for layer in taught if layer not in known]
    if odd or sorted({*taught}) != taught:
        raise ConfigError(
            f"--layers is {taught}; allowed: different layers of experts, ascending, of "
            f"{', '.join(map(str, known))}"
        )
    student = Student(known, taught, experts)
    skills = _skills(args, routes, (num_layers(pattern), experts)) if args.skill_maps else None
    sums = None if stored is None else _survey(args, run, routes, command)
    if cli.rank() > 0:
        return ""
    together = routed_together(routes, args.samples) if args.method == "clusters" else None
    made = make_map(args.method, routes, student, sums, skills, together)
    made.save(Path(args.out))
    lines = [f"layer {mine}: the teacher's {theirs}" for mine, theirs in made.layers.items()]
    return "\n".join([*lines, f"written: {args.out}"])


def _survey(args: argparse.Namespace, run: Any, routes: Any, command: Any) -> Any:
    from megatron_mm.checkpoint import sharded
    from megatron_mm.data.tokenizer import load_tokenizer
    from megatron_mm.mimic.rounds import BATCH_SIZE, Rows
    from megatron_mm.mimic.survey import survey

    tokenizer = load_tokenizer(run.data.tokenizer_model, run.data.end_tokens)
    engine = command.engine(run)
    sharded.load(engine, args.checkpoint, finetune=True)
    rows = Rows(args.data, args.samples, args.batch_size or BATCH_SIZE)
    return survey(engine, tokenizer, rows, routes)


def _skills(args: argparse.Namespace, routes: Any, student: tuple[int, int]) -> Any:
    """Reads both skill maps. How many experts a token takes no map of experts needs to know."""
    from megatron_mm.earl.skill_map import load_skill_map
    from megatron_mm.mimic.make_map import SkillMaps, check_skills

    sizes = (routes.teacher.num_layers, routes.teacher.num_experts), student
    pairs = zip(args.skill_maps, sizes, strict=True)
    found = SkillMaps(*(load_skill_map(path, *size, None) for path, size in pairs))
    check_skills(found)
    return found
