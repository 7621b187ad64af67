"""The settings of reinforcement learning, and what follows from them alone. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

from megatron_mm.config.fields import (
    Bounds,
    Named,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Samples,
)
from megatron_mm.config.settings import RunConfig
from megatron_mm.earl.settings import EARLConfig
from megatron_mm.errors import ConfigError
from megatron_mm.rl.algorithms import (
    ALGORITHMS,
    ESTIMATORS,
    KL_ESTIMATORS,
    LOSS_AGGREGATIONS,
    POLICY_LOSSES,
)
from megatron_mm.rl.rewards.functions import parse_rewards


@dataclass
class RLConfig:
    """Reinforcement learning with group rewards. Names are TRL's, or verl's where TRL has none.

    `algorithm` fills in every setting of the second block that is left at none, so each can also
    be changed by itself.
    """

    algorithm: Annotated[str, Named(ALGORITHMS)] = "grpo"
    """Published algorithm. It decides the settings below whose default is the algorithm's."""
    num_generations: Samples = 8
    """Completions of each prompt; together they are its group."""
    rollout_batch_size: Samples | None = None
    """Prompts of a rollout on all replicas together. Default: as many as one optimizer step has;
    global_batch_size counts completions of a step."""
    num_iterations: Annotated[int, Bounds(ge=1, le=1000)] = 1
    """Optimizer steps that see each completion."""
    max_completion_length: PositiveInt = 256
    """Longest completion in tokens; generation stops there."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature. The policy loss uses log-probabilities at the same temperature."""
    top_p: Annotated[float, Bounds(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens whose probabilities sum to this."""
    top_k: NonNegativeInt = 0
    """Sample from this many most likely tokens; 0: from all."""
    max_num_seqs: Samples = 64
    """Completions that a replica generates at the same time."""
    routing_replay: Literal["none", "R2", "R3"] = "none"
    """Experts that the training pass takes: its own choice (none), those of the trainer's pass
    before the first update (R2, arXiv 2507.18071) or those of the rollout (R3, arXiv
    2510.11370)."""
    rl_moe_aux_loss_coeff: NonNegativeFloat = 0.0
    """Coefficient of the load-balancing loss, in place of moe_aux_loss_coeff."""

    advantage_estimator: Annotated[str | None, Named(ESTIMATORS)] = None
    """How advantages follow from the rewards of a group. Default: the algorithm's."""
    policy_loss: Annotated[str | None, Named(POLICY_LOSSES)] = None
    """Loss of each sampled token. Default: the algorithm's."""
    loss_agg_mode: Annotated[str | None, Named(LOSS_AGGREGATIONS)] = None
    """How token losses are averaged. Default: the algorithm's."""
    epsilon: PositiveFloat | None = None
    """Lower clipping range: the ratio is kept above 1 - epsilon. Default: the algorithm's."""
    epsilon_high: PositiveFloat | None = None
    """Upper clipping range: the ratio is kept below 1 + epsilon_high. Default: the algorithm's."""
    filter_groups: bool | None = None
    """Dynamic sampling: groups whose rewards are all equal are replaced by new ones (DAPO, arXiv
    2503.14476). Default: the algorithm's."""
    max_generation_rounds: Annotated[int, Bounds(ge=1, le=1000)] = 10
    """Rounds of generation for one rollout with filter_groups."""
    delta: PositiveFloat | None = None
    """Dual clip: bound of the ratio where the advantage is negative (arXiv 1912.09729)."""
    sapo_temperature_pos: PositiveFloat = 1.0
    """SAPO's temperature for positive advantages (arXiv 2511.20347)."""
    sapo_temperature_neg: PositiveFloat = 1.05
    """SAPO's temperature for the other advantages (arXiv 2511.20347)."""

    beta: NonNegativeFloat = 0.0
    """Coefficient of the KL divergence from the reference model; 0: no reference model is kept."""
    ref_load: str | None = None
    """Checkpoint of the reference model."""
    kl_estimator: Annotated[str | None, Named(KL_ESTIMATORS)] = None
    """Estimator of the KL divergence. Default: k1 with use_kl_in_reward, else k3. In the loss k1
    does nothing: the expectation of its gradient is zero. In the reward it is the only one whose
    gradient is that of the divergence: near the reference k3 has less than a tenth of it."""
    use_kl_in_reward: bool = False
    """Subtract the KL divergence from the reward instead of adding it to the loss."""
    teacher_load: list[str] = field(default_factory=list)
    """On-policy distillation: the checkpoint of a teacher or, of several, name=checkpoint each."""
    teacher_key: str | None = None
    """Column of the rows that names the teacher of a prompt. Needed with several teachers."""
    teacher_kl_coef: NonNegativeFloat = 0.0
    """Coefficient of log p_teacher - log p_policy, before the first update, in the advantage of a
    token (arXiv 2601.02780, eq. 8 and 9); above 0 with teacher_load. Without reward_funcs nothing
    else is learnt from."""
    rollout_is: Literal["token", "sequence"] | None = None
    """Importance sampling where rollout and trainer disagree on probabilities, for each token or
    for each completion."""
    rollout_is_mode: Literal["truncate", "mask"] = "truncate"
    """Treatment of weights of rollout_is outside their bounds: truncate holds them at the upper
    one, mask takes their tokens out of the policy loss; terms of beta and entropy_coef stay."""
    rollout_is_threshold: PositiveFloat = 2.0
    """Upper bound of the weights of rollout_is, inclusive."""
    rollout_is_threshold_low: NonNegativeFloat = 0.0
    """Lower bound of the weights of rollout_is, inclusive; with rollout_is_mode mask."""
    mask_truncated_completions: bool = False
    """Leave completions that reached max_completion_length without an end out of the loss; their
    rewards still count in their groups (DAPO, arXiv 2503.14476, section 3.4)."""
    entropy_coef: Annotated[float, Bounds(ge=-1e6, le=1e6)] = 0.0
    """Coefficient of the mean entropy, in nats, that is subtracted from the loss."""
    top_entropy_quantile: Annotated[float, Bounds(gt=0, le=1)] = 1.0
    """Share of a step's tokens that the policy loss learns from, those of the highest entropy
    before the rollout's first update (arXiv 2506.01939, section 5); 1: all."""
    advantage_clip_sigma: NonNegativeFloat = 0.0
    """Standardise advantages over all completions, and set those beyond this many standard
    deviations to 0 (StableReinforce, arXiv 2505.02835, eq. 4); 0: off."""

    reward_funcs: list[str] = field(default_factory=list)
    """Reward functions: built-in names or dotted paths, with options, for example exact,
    numeric(tolerance=0.1), my.module.reward."""
    reward_weights: list[float] = field(default_factory=list)
    """Weight of each reward function. Default: 1 each."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = (
        "sum_then_normalize"
    )
    """Whether several rewards are summed before they are normalised in their group, or after; then
    the sum is normalised once more, over all completions (GDPO, arXiv 2601.05242, eq. 6)."""
    advantage_weighting: list[str] = field(default_factory=list)
    """Factors of advantages by how difficult their group was, which are multiplied: observe_r1,
    odsw(stage='medium'), stcr, dads, univg or dotted paths, with options."""
    difficulty_reward: str | None = None
    """Reward function that says which completions are right, by its name in the metrics. Default:
    the only one."""
    difficulty_threshold: Annotated[float, Bounds(ge=-1e6, le=1e6)] = 0.5
    """Least value of difficulty_reward with which a completion is right."""
    reward_std_floor: NonNegativeFloat = 0.0
    """Least standard deviation that a group's rewards are divided by."""
    reward_num_workers: Annotated[int, Bounds(ge=1, le=256)] = 2
    """Processes that run reward functions, for each replica."""
    reward_timeout: PositiveFloat = 10.0
    """Seconds that one call of a reward function may take."""
    reward_memory: PositiveFloat = 2.0
    """GB that one of these processes may hold, with all that its functions start; what a call
    starts ends with it."""
    reward_batch_size: PositiveInt = 1
    """Completions in one call of a reward function. A call of your own function that fails costs
    all of them."""
    reward_lost_value: Annotated[float | None, Bounds(ge=-1e30, le=1e30)] = None
    """Reward of a completion whose call ran out of time or memory, or ended its worker. Default: 0
    for built-in rewards, a failure for your own."""
    max_reward_failures: Annotated[float, Bounds(gt=0, le=1)] = 1.0
    """Share of a step's completions that are left out because a reward failed, at which the run
    stops with that reward's error. 1: all of them."""


@dataclass(kw_only=True)
class ResolvedRL(RLConfig):
    """The settings with nothing left open, and those of EARL: `resolved` makes them."""

    advantage_estimator: str
    policy_loss: str
    loss_agg_mode: str
    epsilon: float
    epsilon_high: float
    filter_groups: bool
    kl_estimator: str
    earl: EARLConfig = field(default_factory=EARLConfig)


def resolve_algorithm(rl: RLConfig, earl: EARLConfig | None = None) -> ResolvedRL:
    """`rl` with the settings that are none filled in from its algorithm."""
    given = ALGORITHMS[rl.algorithm]
    values = vars(rl) | {k: v for k, v in given.items() if getattr(rl, k) is None}
    values["kl_estimator"] = rl.kl_estimator or ("k1" if rl.use_kl_in_reward else "k3")
    return ResolvedRL(**values | ({} if earl is None else {"earl": earl}))


def resolved(run: RunConfig) -> ResolvedRL:
    """The run's settings of reinforcement learning with nothing left open."""
    return resolve_algorithm(run.section(RLConfig), run.section(EARLConfig))


def difficulty_name(rl: RLConfig) -> str:
    """The name of the reward that says which completions are right.

    Raises:
        ConfigError: none is named, and there is not exactly one; or there is none of that name.
        RLError: a reward is written wrongly.
    """
    names = [spec.name for spec in parse_rewards(rl.reward_funcs)]
    if rl.difficulty_reward is None and len(names) == 1:
        return names[0]
    if rl.difficulty_reward not in names:
        raise ConfigError(
            f"rl.difficulty_reward is {rl.difficulty_reward!r}; allowed: one of the {len(names)} "
            f"reward_funcs ({', '.join(names)}), the one that says which completions are right"
        )
    return rl.difficulty_reward


def records_routes(rl: ResolvedRL, rewards_read_them: bool) -> bool:
    """Whether a rollout records the experts that its tokens chose: to replay them, for the skill
    map, or for a reward function that reads `routed_experts`."""
    return rl.routing_replay == "R3" or bool(rl.earl.skill_map) or rewards_read_them


def teacher_folders(rl: RLConfig) -> dict[str, str]:
    """Returns the checkpoint of each teacher by its name; one without a name is `teacher`.

    Raises:
        ConfigError: for a name or a path that is missing, or a name that stands twice.
    """
    found: dict[str, str] = {}
    for word in rl.teacher_load:
        name, equals, folder = word.partition("=")
        if not equals or "/" in name:  # a path may well contain a =
            name, folder = "teacher", word
        unnamed = folder == word and len(rl.teacher_load) > 1
        if unnamed or not name or not folder or name in found:
            raise ConfigError(
                f"rl.teacher_load is {rl.teacher_load!r}; allowed: one checkpoint, or "
                "name=checkpoint for each teacher, every name once"
            )
        found[name] = folder
    return found


def has_base_advantage(rl: ResolvedRL) -> bool:
    """Whether anything but teachers gives an advantage."""
    return bool(
        rl.reward_funcs
        or rl.earl.router_reward_weight
        or rl.use_kl_in_reward
        or rl.earl.span_credit
    )


class RolloutPlan(NamedTuple):
    """Sizes of a rollout in prompts, completions and optimizer steps.

    Attributes:
        prompts: of a rollout, on all replicas together.
        steps: optimizer steps of a rollout, over all its num_iterations passes.
    """

    prompts: int
    prompts_per_step: int
    steps: int


def rollout_plan(run: RunConfig) -> RolloutPlan:
    """The sizes of a run's rollouts."""
    rl = run.section(RLConfig)
    per_step = run.training.global_batch_size // rl.num_generations
    prompts = rl.rollout_batch_size or per_step
    return RolloutPlan(prompts, per_step, prompts // per_step * rl.num_iterations)
