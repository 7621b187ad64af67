"""RL settings: each algorithm is complete, and what does not fit is refused in one line."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from megatron_mm.config import ConfigError, RunConfig, load, validate
from megatron_mm.config.flags import explained
from megatron_mm.config.tree import leaves
from megatron_mm.earl.settings import EARLConfig
from megatron_mm.rl.algorithms import ALGORITHMS
from megatron_mm.rl.settings import RLConfig, resolve_algorithm, teacher_folders


def run_with(**rl):
    run = RunConfig()
    run.training.objective, run.training.global_batch_size = "grpo", 8
    earl = {f.name: rl.pop(f.name) for f in fields(EARLConfig) if f.name in rl}
    run.objectives["rl"] = RLConfig(**{"reward_funcs": ["exact"]} | rl)
    run.objectives["earl"] = EARLConfig(**earl)
    return run


def test_every_algorithm_fills_every_open_setting():
    open_settings = {k for k, v in vars(RLConfig()).items() if v is None} - {"kl_estimator"}
    for name in ALGORITHMS:
        filled = {k for k in open_settings if getattr(resolve_algorithm(RLConfig(name)), k)}
        assert set(ALGORITHMS[name]) - {"filter_groups"} == filled - {"filter_groups"}
        assert set(ALGORITHMS[name]) < open_settings
        validate(run_with(algorithm=name))
    assert len(list(ALGORITHMS)) == 9


def test_what_is_given_wins_over_the_algorithm():
    rl = resolve_algorithm(RLConfig(algorithm="dapo", epsilon_high=0.3, filter_groups=False))
    assert (rl.epsilon, rl.epsilon_high, rl.filter_groups) == (0.2, 0.3, False)
    assert rl.loss_agg_mode == "token-mean"
    assert resolve_algorithm(rl) == rl


def test_settings_are_flags():
    flags = "--algorithm gspo --beta 0.01 --reward-funcs exact numeric(tolerance=0.1) "
    flags += "--reward-weights 1 0.5 --filter-groups --delta 4"
    rl = load(None, ["--preset", "tiny", *flags.split()]).section(RLConfig)
    expected = RLConfig(
        algorithm="gspo",
        beta=0.01,
        reward_funcs=["exact", "numeric(tolerance=0.1)"],
        reward_weights=[1.0, 0.5],
        filter_groups=True,
        delta=4.0,
    )
    assert rl == expected


@pytest.mark.parametrize(
    ("rl", "message"),
    [
        ({"num_generations": 1}, "rl.num_generations is 1; allowed: 2 or more"),
        ({"delta": 1.1}, "rl.delta is 1.1; allowed: none, or more than 1 + epsilon_high = 1.2"),
        ({"delta": 9.0, "algorithm": "sapo"}, "with policy_loss clip or gspo"),
        ({"epsilon": 1.5}, "rl.epsilon is 1.5"),
        ({"reward_weights": [1.0, 2.0]}, "one for each of the 1 reward_funcs"),
        ({"reward_weights": [float("nan")]}, "finite numbers"),
        ({"reward_funcs": []}, "at least 1 reward, or none with teacher_load"),
        ({"teacher_kl_coef": 1.0}, "rl.teacher_kl_coef is 1.0; allowed: 0, or this value with tea"),
        (
            {"teacher_load": ["one"]},
            "rl.teacher_kl_coef is 0.0; allowed: above 0 with teacher_load",
        ),
        (
            {"teacher_load": ["a=one", "b=two"], "teacher_kl_coef": 1.0},
            "rl.teacher_key is None; allowed: the column that names a row's teacher: a, b",
        ),
        ({"teacher_key": "skill"}, "rl.teacher_key is 'skill'; allowed: none, or a column with"),
        (
            {"teacher_load": ["one", "b=two"], "teacher_kl_coef": 1.0, "teacher_key": "skill"},
            "rl.teacher_load is ['one', 'b=two']; allowed: one checkpoint, or name=checkpoint for",
        ),
        (
            {"teacher_load": ["a=one", "a=two"], "teacher_kl_coef": 1.0, "teacher_key": "skill"},
            "rl.teacher_load is ['a=one', 'a=two']; allowed: one checkpoint, or name=checkpoint",
        ),
        (
            {
                "teacher_load": ["one"],
                "teacher_kl_coef": 1.0,
                "reward_funcs": [],
                "filter_groups": True,
            },
            "rl.filter_groups is True; allowed: false, or true with reward_funcs",
        ),
        (
            {"teacher_load": ["one"], "teacher_kl_coef": 1.0, "num_generations": 1},
            "rl.num_generations is 1; allowed: 2 or more, a group",
        ),
        ({"num_generations": 3}, "rl.num_generations is 3; allowed: one that divides global_batch"),
        ({"num_generations": 4, "rollout_batch_size": 3}, "a multiple of global_batch_size / num"),
        ({"rollout_batch_size": 3}, "train_iters is 100; allowed: a multiple of a rollout's 3 st"),
        ({"max_completion_length": 4096}, "max_completion_length is 4096; allowed: less than seq"),
        ({"top_p": 1.5}, "rl.top_p is 1.5; allowed: more than 0 to 1"),
        ({"beta": 0.1}, "rl.ref_load is None; allowed: the reference model's checkpoint"),
        ({"use_kl_in_reward": True}, "true with beta above 0"),
        (
            {
                "use_kl_in_reward": True,
                "beta": 0.1,
                "ref_load": "sft",
                "multi_objective_aggregation": "normalize_then_sum",
            },
            "rl.use_kl_in_reward is True; allowed: false with multi_objective_aggregation",
        ),
        (
            {"router_temperature": 0.5, "routing_replay": "R2"},
            "earl.router_temperature is 0.5; allowed: 0, or this value with routing_replay R3",
        ),
        (
            {
                "router_temperature": 0.5,
                "routing_replay": "R3",
                "skill_map": "map.json",
                "router_loss_coeff": 0.1,
                "num_iterations": 2,
            },
            "earl.router_temperature is 0.5; allowed: 0, or this value where a rollout serves one",
        ),
        (
            {"router_loss_coeff": 0.1},
            "earl.router_loss_coeff is 0.1; allowed: left out, or this value",
        ),
        (
            {"skill_map_shuffle_seed": 0},
            "earl.skill_map_shuffle_seed is 0; allowed: left out, or this value with skill_map",
        ),
        (
            {"expert_scope": True},
            "earl.expert_scope is True; allowed: left out, or this value with skill_map",
        ),
        (
            {
                "reward_funcs": [],
                "skill_map": "map.json",
                "router_reward_weight": 0.3,
                "filter_groups": True,
            },
            "rl.filter_groups is True; allowed: false, or true with reward_funcs",
        ),
    ],
)
def test_what_does_not_fit_is_refused(rl, message):
    with pytest.raises(ConfigError) as caught:
        validate(run_with(**rl))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_frozen_routers_have_no_term():
    run = run_with(router_loss_coeff=0.1, skill_map="map.json")
    validate(run)
    run.training.freeze_router = True
    with pytest.raises(ConfigError, match=r"router_loss_coeff is 0.1; allowed: 0 with freeze_rout"):
        validate(run)


def test_teachers_are_flags_and_need_no_group():
    flags = "--teacher-load steps=runs/a free=runs/b=c --teacher-key form --teacher-kl-coef 0.5"
    rl = load(None, ["--preset", "tiny", *flags.split()]).section(RLConfig)
    assert teacher_folders(rl) == {"steps": "runs/a", "free": "runs/b=c"}
    assert teacher_folders(RLConfig(teacher_load=["./a=b"])) == {"teacher": "./a=b"}
    run = run_with(teacher_load=["one"], teacher_kl_coef=1.0, reward_funcs=[], num_generations=1)
    validate(run)


def test_a_reference_moves_where_there_is_one():
    run = run_with(beta=0.1, ref_load="ref")
    reference = run.objectives["reference"]
    reference.sync_ref_model = True
    validate(run)
    run.lora.lora_rank = 4
    with pytest.raises(ConfigError, match=r"sync_ref_model is True; allowed: false with lora_rank"):
        validate(run)
    run = run_with()
    run.objectives["reference"] = reference
    with pytest.raises(ConfigError, match=r"false, or true with rl.ref_load and rl.beta above 0"):
        validate(run)
    run.training.objective, run.objectives["rl"] = "sft", RLConfig()
    with pytest.raises(ConfigError, match=r"reference.sync_ref_model is True; allowed: False with"):
        validate(run)


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (
            "training",
            {"freeze_experts": True},
            "but freeze_experts is True and lora_targets are []",
        ),
        ("lora", {"lora_rank": 4}, "but freeze_experts is False and lora_targets are ['language']"),
        (
            "parallel",
            {"moe_token_dispatcher_type": "flex", "expert_model_parallel_size": 2},
            "moe_token_dispatcher_type is 'flex'; allowed with earl.expert_scope: alltoall, which",
        ),
    ],
)
def test_a_scope_that_cannot_work_is_refused(section, settings, message):
    run = run_with(expert_scope=True, skill_map="map.json")
    validate(run)
    for key, value in settings.items():
        setattr(getattr(run, section), key, value)
    with pytest.raises(ConfigError) as caught:
        validate(run)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    run.section(EARLConfig).expert_scope = False
    validate(run)


def test_fine_tuning_has_no_settings_of_completions():
    run = RunConfig()
    run.section(EARLConfig).skill_map = "map.json"
    validate(run)
    run.section(EARLConfig).span_credit = 0.1
    with pytest.raises(ConfigError, match="earl.span_credit is 0.1; allowed: 0 with objective sft"):
        validate(run)


@pytest.mark.parametrize(
    ("replicas", "batch", "problem"),
    [
        # Groups of 4. Of 10 replicas with 15 prompts 5 have two and 5 one: 15 of 20 turns.
        (8, 32, None),
        (4, 32, None),
        (16, 32, "8 prompts a step on 16 replicas, of which 50% would be idle, since a group stays "
         "on one; allowed: a multiple of 16 prompts, such as global_batch_size 64"),
        (5, 40, None),
        (10, 80, None),
        (5, 60, None),
        (10, 60, "15 prompts a step on 10 replicas, of which 25% would be idle, since a group "
         "stays on one; allowed: a multiple of 10 prompts, such as global_batch_size 80"),
    ],
)  # fmt: skip
def test_every_replica_gets_as_many_prompts(replicas, batch, problem):
    run = run_with(num_generations=4, max_completion_length=8)
    run.training.global_batch_size = batch
    if problem is None:
        return validate(run, replicas)
    with pytest.raises(ConfigError) as caught:
        validate(run, replicas)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "objective", "gpus"),
    [
        ("mm-80b", "sft", 256),
        ("mm-80b-align", "sft", 256),
        ("mm-80b-earl", "grpo", 256),
        ("mm-35b-lora", "sft", 8),
    ],
)
def test_the_examples_fit_the_gpus_that_they_name(name, objective, gpus):
    run = load(Path(__file__).parents[2] / "examples" / f"{name}.yaml")
    validate(run, gpus)
    assert run.training.objective == objective


def test_phases_of_prompts_are_counted_in_prompts():
    """A step's batch counts completions, and a rollout serves several steps."""
    flags = "--objective grpo --reward-funcs exact --num-generations 8 --num-iterations 2"
    flags += " --global-batch-size 64 --train-iters 20 --max-completion-length 16"
    enough = load(None, [*flags.split(), "--train-data", "a.jsonl:40", "b.jsonl:40"])
    validate(enough)  # 10 rollouts of 8 prompts
    few = load(None, [*flags.split(), "--train-data", "a.jsonl:40", "b.jsonl:39"])
    with pytest.raises(ConfigError, match="holds 79 samples in its 2 phases, .* 20 steps need 80;"):
        validate(few)


def test_rl_settings_of_a_run_without_rl_are_refused():
    run = RunConfig()
    validate(run)
    run.objectives["rl"] = replace(run.section(RLConfig), epsilon=0.3)
    with pytest.raises(ConfigError, match="rl.epsilon is 0.3; allowed: None with objective sft"):
        validate(run)


def test_help_explains_every_setting_and_lists_the_names_of_a_registry():
    settings = {leaf.name: leaf for leaf in leaves(RunConfig) if leaf.path[0] in ("rl", "earl")}
    assert len(settings) > 40 and all(leaf.explanation for leaf in settings.values())
    assert "grpo, dr_grpo, dapo, gspo" in explained(settings["algorithm"])
    assert "k1, k2, k3 or a dotted path; default: none [rl]" in explained(settings["kl_estimator"])
