"""How good a model is: the probability of given texts, and scores on tasks. Written by hand.

`perplexity` and `log_likelihoods` need nothing but the engine. `llamabook.evaluate.harness` runs the tasks of lm-eval,
the harness that most published scores come from, on it; `llamabook.evaluate.farm` has the tasks of the llama farm.
"""

from llamabook.evaluate.perplexity import (
    Perplexity,
    log_likelihoods,
    perplexity,
    perplexity_of_file,
    perplexity_of_text,
)

__all__ = ["Perplexity", "log_likelihoods", "perplexity", "perplexity_of_file", "perplexity_of_text"]
