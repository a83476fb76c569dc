"""What several benchmarks have in common: methods, default settings, columns."""

from hf_unlearn.benchmark.registry import Column

METHODS = "grad_ascent,grad_diff,npo,simnpo,rmu,idk,undial,pgu,next_best"
CONSTRAINTS_COMPARED = "none,energy,ridge,kronecker"
OPEN_UNLEARNING = "open-unlearning, docs/repro.md (untuned, as it says)"

COMMON_DEFAULTS = {
    "constraints": CONSTRAINTS_COMPARED,
    "attacks": "relearning",
    "use_retain_rows": True,
    "seeds": "0,1,2",
}
TEXT_COLUMNS = (
    Column("forget probability", "answer_probability", "forget"),
    Column("retain probability", "answer_probability", "retain"),
    Column("membership AUC", "membership_auc", "forget"),
    Column("relearned", "relearned_probability", "forget"),
)
