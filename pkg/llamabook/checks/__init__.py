"""The checks of the book's exercises, written by hand.

`checks.check_rms_norm(rms_norm)` passes or says in one line what is wrong. `report()` shows the score of a
session, `grade(namespace)` runs every check quietly on a notebook's functions, and `exercises(chapter)` lists
names, points, minutes and difficulties.
"""

from llamabook.checks.ch01_model import (
    check_apply_rope,
    check_causal_attention,
    check_causal_mask,
    check_count_parameters,
    check_hidden_width,
    check_inference_bytes,
    check_interleaved_to_half_split,
    check_repaired_block,
    check_rms_norm,
    check_rope_frequencies,
    check_rope_score,
    check_silu_slope,
    check_swiglu,
)
from llamabook.checks.ch01_text import (
    check_chat_prompt,
    check_entropy_gap,
    check_generate_batch,
    check_merge_shards,
    check_stream_text,
    check_top_k_probs,
    check_top_p_probs,
)
from llamabook.checks.core import (
    CheckFailed,
    Exercise,
    Report,
    Result,
    exercises,
    grade,
    report,
    reset,
    score,
)

__all__ = [
    "CheckFailed",
    "Exercise",
    "Report",
    "Result",
    "check_apply_rope",
    "check_causal_attention",
    "check_causal_mask",
    "check_chat_prompt",
    "check_count_parameters",
    "check_entropy_gap",
    "check_generate_batch",
    "check_hidden_width",
    "check_inference_bytes",
    "check_interleaved_to_half_split",
    "check_merge_shards",
    "check_repaired_block",
    "check_rms_norm",
    "check_rope_frequencies",
    "check_rope_score",
    "check_silu_slope",
    "check_stream_text",
    "check_swiglu",
    "check_top_k_probs",
    "check_top_p_probs",
    "exercises",
    "grade",
    "report",
    "reset",
    "score",
]
