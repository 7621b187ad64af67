"""Check that a megatron checkpoint holds a Hugging Face folder's model.

    python tools/check_parity.py --hf DIR --checkpoint DIR
    python tools/check_parity.py --hf DIR --checkpoint DIR --image FILE --prompt TEXT

First every tensor of the folder is compared bit for bit with the one exported from the
checkpoint. Then conversations with and without images go through the folder's own template,
tokenizer and processor: token ids and pixel values must be bitwise those of training, as must end
tokens and dtype. Then, in fp32, every layer's output and the logits are compared between
transformers and megatron_mm, on built-in random prompts with images of several tile counts (and
with queries, if the model glimpses) or on the given ones. Prints the first layer that differs, with
the relative difference. `--tensors-only` stops after the first part. transformers cannot load
InternVL's original release; its weights reach the transformers model by way of this package's table
of names.
"""

from __future__ import annotations

from megatron_mm import cli


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 if all is equal; 1 if something differs or cannot be read; 2 for
    wrong settings."""
    cli.setup_logging(cli.rank())
    from megatron_mm import platform

    platform.quiet()
    platform.hide_gpus()  # transformers computes on the CPU, to whose rounding the bound belongs
    platform.install()

    from megatron_mm.config import ParallelConfig, RunConfig
    from megatron_mm.config.flags import add_plugins
    from megatron_mm.config.load import import_plugins
    from megatron_mm.convert import hf_model, parity, to_hf
    from megatron_mm.convert.commands.job import run_job
    from megatron_mm.convert.folder import check_folder, open_folder
    from megatron_mm.convert.parity_inputs import compare_inputs
    from megatron_mm.data.tokenizer import load_tokenizer
    from megatron_mm.errors import ConvertError, DataError
    from megatron_mm.model.blueprint import blueprint
    from megatron_mm.parallel import groups

    parser = cli.Parser(__doc__)
    add_plugins(parser)
    parser.add_argument("--hf", type=cli.path, required=True)
    parser.add_argument("--checkpoint", type=cli.path, required=True)
    parser.add_argument("--image", type=cli.path)
    parser.add_argument("--prompt", help="default: random tokens")
    parser.add_argument("--tensors-only", action="store_true")
    parser.add_argument("--trust-remote-code", action="store_true")

    def work(group) -> list[str]:
        args = parser.parse_args(argv)
        import_plugins(args.plugins)
        if group.size() > 1:
            raise ConvertError(f"{group.size()} ranks: parity is checked by one")
        source = open_folder(args.hf)
        mapping = source.mapping(blueprint(source.model))
        check_folder(source, mapping)
        checkpoint = to_hf.open_checkpoint(args.checkpoint)
        differing = list(parity.differing_tensors(source, mapping, checkpoint))
        for line in differing[:10]:
            cli.say(line)
        if differing:
            raise ConvertError(f"{len(differing)} tensors differ (first {differing[0]})")
        count = sum(1 for link in mapping.links for _ in link.hf_tensors()) + len(mapping.carried)
        lines = [f"{count} tensors are bitwise identical"]
        if args.tensors_only:
            return lines
        if hf_model.is_release(args.hf):
            hf = hf_model.released_in_transformers(source, mapping)
        else:
            hf = hf_model.load_transformers(args.hf, args.trust_remote_code)
        run = RunConfig(model=checkpoint.model)
        try:
            lines += compare_inputs(source, checkpoint, args.trust_remote_code)
            if args.prompt is None:
                cases = parity.built_in_cases(run, source.image_token_id, source.look_ids)
            else:
                tokenizer = load_tokenizer(args.hf)
                cases = [parity.given_case(run, tokenizer, args.prompt, args.image)]
        except DataError as error:
            raise ConvertError(str(error)) from None
        mcore = parity.mcore_model(checkpoint, groups.build(ParallelConfig()))
        worst = 0.0
        for found in parity.compare_outputs(checkpoint, mcore, hf, run, cases):
            if not found.size <= parity.TOLERANCE:
                raise ConvertError(
                    f"{found.case}: {found.where} is the first to part, by {found.size:.3g} "
                    f"(allowed: {parity.TOLERANCE:g})"
                )
            worst = max(worst, found.size)
        return [*lines, f"every layer and the logits agree to {worst:.2g}, {len(cases)} prompts"]

    return run_job(work)
