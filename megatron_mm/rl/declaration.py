"""The declaration of reinforcement learning as an objective."""

from __future__ import annotations

from megatron_mm.config.objectives import Declaration
from megatron_mm.config.settings import RunConfig
from megatron_mm.earl.settings import EARLConfig
from megatron_mm.rl.checks import check_replicas, check_rl
from megatron_mm.rl.reference_settings import ReferenceConfig
from megatron_mm.rl.settings import RLConfig, rollout_plan


def _balance(run: RunConfig) -> float:
    return run.section(RLConfig).rl_moe_aux_loss_coeff


def _prompts(run: RunConfig) -> int:
    """Those of all rollouts; with dynamic sampling more are drawn."""
    if run.training.global_batch_size < run.section(RLConfig).num_generations:
        return 0  # which is rejected later
    plan = rollout_plan(run)
    return run.training.train_iters // plan.steps * plan.prompts if plan.steps else 0


GRPO = Declaration(
    source="megatron_mm.rl.rollout.experience.Experience",
    loader="megatron_mm.rl.rollout.prompts.PromptLoader",
    sections={"rl": RLConfig, "earl": EARLConfig, "reference": ReferenceConfig},
    check=check_rl,
    check_replicas=check_replicas,
    console=(
        "reward",
        "reward_std",
        "kl",
        "teacher/kl",
        "entropy",
        "completions/mean_length",
        "rollout/moe/hit_rate",
    ),
    before="megatron_mm.evaluation.examples.write_experts_before",
    moe_aux_loss_coeff=_balance,
    generates=True,
    rows=_prompts,
    mean_over_tokens=False,
)
