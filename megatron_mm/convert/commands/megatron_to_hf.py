"""Convert a megatron checkpoint, of any layout, to a folder that transformers loads.

    python tools/megatron_to_hf.py --checkpoint DIR --out DIR
    torchrun --nproc-per-node 8 tools/megatron_to_hf.py --checkpoint DIR --out DIR --dtype bf16

Without CLVR the folder is a plain InternVLForConditionalGeneration around the language model (or a
text-only model such as Qwen3NextForCausalLM). With CLVR it carries its own code, which transformers
runs only with `trust_remote_code=True`. Tokenizer and processor files come from the folder that the
checkpoint was converted from, or from `--assets`.
"""

from __future__ import annotations

from megatron_mm import cli


def main(argv: list[str]) -> int:
    """Returns the exit code: 0; 1 if a folder cannot be read or written; 2 for wrong settings."""
    cli.setup_logging(cli.rank())
    from megatron_mm import platform

    platform.quiet()
    platform.hide_gpus()  # it computes nothing, and may have more ranks than GPUs
    platform.install()

    from megatron_mm.checkpoint.collective import raising_together
    from megatron_mm.config.flags import add_plugins
    from megatron_mm.config.load import import_plugins
    from megatron_mm.convert import to_hf
    from megatron_mm.convert.commands.job import DTYPES, run_job
    from megatron_mm.convert.folder import travelling
    from megatron_mm.convert.hf_writer import SHARD_BYTES
    from megatron_mm.errors import CheckpointError

    parser = cli.Parser(__doc__)
    add_plugins(parser)
    parser.add_argument("--checkpoint", type=cli.path, required=True)
    parser.add_argument("--out", type=cli.path, required=True)
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: as in the checkpoint")
    parser.add_argument("--assets", type=cli.path, help="folder of tokenizer and processor files")
    parser.add_argument("--stacked", action="store_true", help="a layer's experts as one tensor")
    parser.add_argument("--max-shard-size", type=int, default=SHARD_BYTES, help="bytes")

    def work(group) -> list[str]:
        args = parser.parse_args(argv)
        import_plugins(args.plugins)
        with raising_together(group, f"cannot load {args.checkpoint}"):
            checkpoint = to_hf.open_checkpoint(args.checkpoint)
            assets = None if args.assets is None else travelling(args.assets)
            if assets == []:
                raise CheckpointError(f"{args.assets} holds no tokenizer and no processor")
        lines = to_hf.convert(
            checkpoint,
            args.out,
            group,
            stacked=args.stacked,
            dtype=DTYPES.get(args.dtype),
            assets=assets,
            shard_bytes=args.max_shard_size,
        )
        return [*lines, f"converted: {args.out}"]

    return run_job(work)
