"""Checks of the settings of reinforcement learning."""

from __future__ import annotations

from typing import Any

from megatron_mm.config.settings import RunConfig
from megatron_mm.earl.checks import check_policy_earl
from megatron_mm.errors import ConfigError, unknown
from megatron_mm.plugins import parse_specs
from megatron_mm.rl.algorithms import (
    ALGORITHMS,
    ESTIMATORS,
    KL_ESTIMATORS,
    LOSS_AGGREGATIONS,
    POLICY_LOSSES,
    WEIGHTINGS,
)
from megatron_mm.rl.reference_settings import check_reference
from megatron_mm.rl.settings import (
    ResolvedRL,
    RLConfig,
    difficulty_name,
    has_base_advantage,
    resolved,
    rollout_plan,
    teacher_folders,
)


def check_rl(run: RunConfig) -> None:
    """Raises ConfigError for settings that do not fit each other. Bounds are checked already."""
    _check_algorithm(run.section(RLConfig).algorithm)
    rl = resolved(run)
    ESTIMATORS.check(rl.advantage_estimator)
    POLICY_LOSSES.check(rl.policy_loss)
    LOSS_AGGREGATIONS.check(rl.loss_agg_mode)
    KL_ESTIMATORS.check(rl.kl_estimator)
    taught = _check_teachers(rl)
    alone = taught and not has_base_advantage(rl)
    allowed = "2 or more, a group"
    _require(rl.num_generations > 1 or alone, "num_generations", rl.num_generations, allowed)
    _require(rl.epsilon <= 1, "epsilon", rl.epsilon, "above 0 to 1; 1 is no lower bound")
    least = 1 + rl.epsilon_high
    allowed = f"none, or more than 1 + epsilon_high = {least:g}"
    _require(rl.delta is None or rl.delta > least, "delta", rl.delta, allowed)
    allowed = "none, or this value with policy_loss clip or gspo"
    ignored = rl.policy_loss in ("sapo", "cispo", "reinforce")
    _require(rl.delta is None or not ignored, "delta", rl.delta, allowed)
    functions, weights = len(rl.reward_funcs), len(rl.reward_weights)
    allowed = f"none, or one for each of the {functions} reward_funcs"
    _require(weights in (0, functions), "reward_weights", rl.reward_weights, allowed)
    _require(
        all(abs(w) < float("inf") for w in rl.reward_weights),
        "reward_weights",
        rl.reward_weights,
        "finite numbers",
    )
    _check_rollouts(run)
    # Dynamic sampling compares the functions' rewards; the router's is known too late for it.
    allowed = "false, or true with reward_funcs"
    _require(functions > 0 or not rl.filter_groups, "filter_groups", rl.filter_groups, allowed)
    routed = rl.earl.router_reward_weight > 0
    allowed = "at least 1 reward, or none with teacher_load"
    _require(functions > 0 or routed or taught, "reward_funcs", rl.reward_funcs, allowed)
    idle = functions > 0 and rl.reward_weights and not any(rl.reward_weights)
    allowed = "none, or at least 1 weight that is not 0: nothing else is learnt from"
    _require(not idle or routed or taught, "reward_weights", rl.reward_weights, allowed)
    _require(
        rl.beta > 0 or not rl.use_kl_in_reward,
        "use_kl_in_reward",
        rl.use_kl_in_reward,
        "false, or true with beta above 0",
    )
    apart = rl.multi_objective_aggregation == "normalize_then_sum"
    _require(
        not (apart and rl.use_kl_in_reward),
        "use_kl_in_reward",
        rl.use_kl_in_reward,
        "false with multi_objective_aggregation normalize_then_sum, which would divide the KL by "
        "its own deviation, so that beta weighs no divergence",
    )
    masks = rl.rollout_is is not None and rl.rollout_is_mode == "mask"
    low, high = rl.rollout_is_threshold_low, rl.rollout_is_threshold
    allowed = "0, or this value with rollout_is and rollout_is_mode mask"
    _require(masks or not low, "rollout_is_threshold_low", low, allowed)
    allowed = f"0 to rollout_is_threshold {high:g}"
    _require(low <= high, "rollout_is_threshold_low", low, allowed)
    whitened = rl.advantage_estimator.startswith("reinforce_plus_plus")
    way, sigma = rl.multi_objective_aggregation, rl.advantage_clip_sigma
    allowed = f"sum_then_normalize with estimator {rl.advantage_estimator}, which whitens"
    fine = not whitened or way == "sum_then_normalize"
    _require(fine, "multi_objective_aggregation", way, allowed)
    allowed = f"0 with estimator {rl.advantage_estimator}, which whitens"
    _require(not (whitened and sigma), "advantage_clip_sigma", sigma, allowed)
    _check_weighting(run)
    check_policy_earl(run)
    chosen = rl.earl.router_loss_coeff > 0 and not rl.earl.router_temperature
    allowed = "0, or this value with reward_funcs, whose rewards weigh the spans"
    _require(
        functions > 0 or not chosen, "router_loss_coeff", rl.earl.router_loss_coeff, allowed, "earl"
    )
    drawn = rl.earl.router_temperature
    allowed = "0, or this value with routing_replay R3, which trains through the drawn experts"
    _require(not drawn or rl.routing_replay == "R3", "router_temperature", drawn, allowed, "earl")
    steps = rollout_plan(run).steps
    allowed = (
        f"0, or this value where a rollout serves one step, not {steps}: see router_loss_coeff"
    )
    late = rl.earl.router_loss_coeff > 0 and steps > 1  # REINFORCE, without a ratio to the draw
    _require(not (drawn and late), "router_temperature", drawn, allowed, "earl")


def check_replicas(run: RunConfig, replicas: int) -> None:
    """Raises ConfigError unless every replica gets as many prompts of a step as the others: a group
    is drawn and trained on by one replica, and the others would wait for the busiest."""
    group, batch = run.section(RLConfig).num_generations, run.training.global_batch_size
    prompts = rollout_plan(run).prompts_per_step
    if prompts % replicas:
        most = -(-prompts // replicas)
        idle = 1 - prompts / (most * replicas)
        raise ConfigError(
            f"global_batch_size {batch} / num_generations {group} is {prompts} prompts a step on "
            f"{replicas} replicas, of which {idle:.0%} would be idle, since a group stays on one; "
            f"allowed: a multiple of {replicas} prompts, such as global_batch_size "
            f"{most * replicas * group}"
        )


def _check_teachers(rl: ResolvedRL) -> bool:
    """Whether there are teachers, whose settings fit together."""
    names, share = [*teacher_folders(rl)], rl.teacher_kl_coef
    allowed = "above 0 with teacher_load" if names else "0, or this value with teacher_load"
    _require((share > 0) == bool(names), "teacher_kl_coef", share, allowed)
    key, several = rl.teacher_key, len(names) > 1
    allowed = f"the column that names a row's teacher: {', '.join(names)}"
    _require(bool(key) or not several, "teacher_key", key, allowed)
    allowed = "none, or a column with teacher_load"
    _require(key is None or bool(names), "teacher_key", key, allowed)
    return bool(names)


def _check_algorithm(name: str) -> None:
    """Rejects an algorithm that leaves open what the built-in ones decide."""
    given, needed = ALGORITHMS[name], ALGORITHMS["grpo"]
    for key in needed:
        if key not in given:
            raise ConfigError(f"algorithm {name} has no `{key}`; it needs {', '.join(needed)}")
    for key in given:
        if key not in needed:
            raise unknown(f"key in algorithm {name}:", key, needed)


def _check_weighting(run: RunConfig) -> None:
    rl = run.section(RLConfig)
    specs = parse_specs(rl.advantage_weighting, WEIGHTINGS)
    if specs or rl.difficulty_reward is not None:
        difficulty_name(rl)
    for spec in specs:
        WEIGHTINGS.check(spec.path)
    in_loss = rl.beta > 0 and not rl.use_kl_in_reward
    allowed = "without dads, or with beta above 0 and use_kl_in_reward false: it weighs that term"
    weighs_kl = any(spec.path == "dads" for spec in specs)
    _require(in_loss or not weighs_kl, "advantage_weighting", rl.advantage_weighting, allowed)


def _check_rollouts(run: RunConfig) -> None:
    rl, training, data = run.section(RLConfig), run.training, run.data
    group, batch = rl.num_generations, training.global_batch_size
    allowed = f"one that divides global_batch_size = {batch}, which counts completions"
    _require(batch % group == 0, "num_generations", group, allowed)
    prompts = rl.rollout_batch_size or batch // group
    allowed = f"a multiple of global_batch_size / num_generations = {batch // group} prompts"
    _require(prompts * group % batch == 0, "rollout_batch_size", rl.rollout_batch_size, allowed)
    steps = rollout_plan(run).steps
    for key, value in (
        ("train_iters", training.train_iters),
        ("save_interval", run.checkpoint.save_interval or 0),
        ("eval_interval", run.evaluation.eval_interval or 0),
    ):
        if value % steps:  # a rollout is used up before anything is saved
            raise ConfigError(f"{key} is {value}; allowed: a multiple of a rollout's {steps} steps")
    if rl.max_completion_length >= data.seq_length:
        raise ConfigError(
            f"rl.max_completion_length is {rl.max_completion_length}; allowed: less than "
            f"seq_length = {data.seq_length}, which prompt and completion share"
        )
    for key, value in (("packing", data.packing), ("num_workers", data.num_workers)):
        if value:
            raise ConfigError(
                f"{key} is {value!r}; allowed: {type(value)()!r} with objective "
                f"{training.objective}, which generates its data"
            )
    needed = "the reference model's checkpoint with beta above 0, none with beta 0"
    _require((rl.beta > 0) == bool(rl.ref_load), "ref_load", rl.ref_load, needed)
    check_reference(run, None if rl.ref_load else "rl.ref_load and rl.beta above 0")


def _require(condition: bool, key: str, value: Any, allowed: str, section: str = "rl") -> None:
    if not condition:
        raise ConfigError(f"{section}.{key} is {value!r}; allowed: {allowed}")
