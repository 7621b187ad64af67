"""Measure which tokens a run of `hop_arms.py` hands over, by kind of question.

    python -m examples.digits.hop_shares --run runs/arms/cascaded_experts/seed1/cascade \\
        --data runs/demo/data/valid.jsonl

The share is over the tokens of the run's own greedy answers and over all layers. It goes into
shares.json of the run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from examples.digits.measure import first_of_each
from megatron_mm.outputs import whole_file

ASKED = 100  # questions of each kind


def shares(engine: Any, tokenizer: Any, path: Path) -> dict[str, float]:
    """Returns the share of tokens handed over in the answers of each kind of question."""
    from megatron_mm.evaluation.questions import EvalSet
    from megatron_mm.generation.generate import Prompts, generate
    from megatron_mm.generation.sampling import Sampling
    from megatron_mm.model.routing import NOT_HANDED

    run, found = engine.run, {}
    questions, first = EvalSet(path, run, tokenizer), run.model.language.moe_router_topk
    keys = [questions.key(index) for index in range(len(questions))]
    sampling = Sampling(tokenizer.end_ids, run.evaluation.max_new_tokens, 0.0)
    for key, indices in first_of_each(keys, ASKED).items():
        chosen = [questions[index].sample for index in indices]
        prompts = Prompts(chosen.__getitem__, indices)
        answers = generate(
            engine,
            prompts,
            sampling,
            max_num_seqs=run.evaluation.eval_batch_size,
            pad_id=tokenizer.pad_id,
            record_routes=True,
        )
        assert answers is not None  # nothing asks it to stop
        handed = [
            (completion.routes_GLk[:, :, first] != NOT_HANDED).double().mean(1)
            for group in answers
            for completion in group
        ]
        total = sum(len(of_tokens) for of_tokens in handed)
        found[key] = float(sum(of_tokens.sum() for of_tokens in handed)) / total
    return found


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 1 if the checkpoint or the data cannot be used."""
    from megatron_mm.checkpoint.command import CheckpointCommand

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args(argv)
    with CheckpointCommand() as command:  # before megatron-core is imported
        from megatron_mm.checkpoint import sharded
        from megatron_mm.data.tokenizer import load_tokenizer
        from megatron_mm.earl.stored_run import stored_run

        path, stored = command.resolve(args.run / "checkpoint")
        run = stored_run(stored["config"], [], 1, str(args.data))
        tokenizer = load_tokenizer(run.data.tokenizer_model, run.data.end_tokens)
        engine = command.engine(run)
        sharded.load(engine, path, finetune=True)
        engine.training(False)
        with whole_file(args.run / "shares.json") as partial:
            partial.write_text(json.dumps(shares(engine, tokenizer, args.data), indent=1) + "\n")
    return command.status


if __name__ == "__main__":
    raise SystemExit(main())
