"""Every setting of a run and the layer-pattern parser. Importing this needs no torch."""

from megatron_mm.config.checks import data_parallel_size, validate
from megatron_mm.config.flags import make_parser
from megatron_mm.config.hf import from_transformers_dict, to_transformers_dict
from megatron_mm.config.load import dump_yaml, from_dict, load, run_of_checkpoint, to_dict
from megatron_mm.config.memories import Memory, look_memories, memories, read_memories
from megatron_mm.config.pairs import moved_pairs, pair_places
from megatron_mm.config.pattern import (
    Layer,
    Stage,
    base_pattern,
    effective_pattern,
    experts_needed,
    hops,
    memories_of_pairs,
    model_stages,
    modules_of,
    num_layers,
    parse_pattern,
    route_width,
    stages,
    without_clvr,
)
from megatron_mm.config.precision import fp8_alignment, token_multiple
from megatron_mm.config.presets import preset, vision_preset
from megatron_mm.config.settings import (
    MODULES,
    BackendConfig,
    CheckpointConfig,
    DataConfig,
    DataPhase,
    DataSource,
    EvaluationConfig,
    LoggingConfig,
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_mm.config.settings_model import (
    FusionConfig,
    LanguageConfig,
    MemoryConfig,
    ModelConfig,
    VisionConfig,
)
from megatron_mm.config.wire import Manifest, wire
from megatron_mm.errors import ConfigError

__all__ = [
    "MODULES",
    "BackendConfig",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DataPhase",
    "DataSource",
    "EvaluationConfig",
    "FusionConfig",
    "LanguageConfig",
    "Layer",
    "LoggingConfig",
    "LoraConfig",
    "Manifest",
    "Memory",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "Stage",
    "TrainingConfig",
    "VisionConfig",
    "data_parallel_size",
    "dump_yaml",
    "effective_pattern",
    "experts_needed",
    "fp8_alignment",
    "from_dict",
    "from_transformers_dict",
    "load",
    "look_memories",
    "memories_of_pairs",
    "make_parser",
    "memories",
    "model_stages",
    "modules_of",
    "moved_pairs",
    "num_layers",
    "pair_places",
    "parse_pattern",
    "preset",
    "read_memories",
    "hops",
    "route_width",
    "base_pattern",
    "run_of_checkpoint",
    "stages",
    "to_dict",
    "to_transformers_dict",
    "token_multiple",
    "validate",
    "vision_preset",
    "wire",
    "without_clvr",
]
