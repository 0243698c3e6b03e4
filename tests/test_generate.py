"""The generation loop against loops by hand, on models small enough to know what must come."""

import copy
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llamabook.errors import ContextError, InputError
from llamabook.generate import evaluating, generate, stream, text_to_token_ids, token_ids_to_text
from llamabook.gpt import GPT_CONFIG_124M, GPTModel
from llamabook.sampling import next_token_probs, sample

V, CONTEXT = 23, 12


class Counter(nn.Module):
    """After token i comes i + 1, for sure; notes what it is shown, in which mode, with gradients or without."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen = []

    def forward(self, idx):
        self.seen.append((idx.shape[1], self.training, torch.is_grad_enabled()))
        return 50 * nn.functional.one_hot((idx + 1) % V, V).float() * self.weight  # (B, T, V)


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(0)
    model = GPTModel(
        {
            **GPT_CONFIG_124M,
            "vocab_size": V,
            "context_length": CONTEXT,
            "emb_dim": 24,
            "n_heads": 2,
            "n_layers": 2,
            "hidden_dim": 48,
        }
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def by_hand(model, prompt, n, context_size):
    """Greedy text of one row, a list in and a list out."""
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids[-context_size:]]))[0, -1].argmax()))
    return ids


prompts = st.lists(st.integers(0, V - 1), min_size=1, max_size=CONTEXT)


@settings(deadline=None, max_examples=40)
@given(prompts, st.integers(0, 20), st.integers(0, CONTEXT))
def test_greedy_is_the_loop_by_hand_also_beyond_the_context(gpt, prompt, n, spare):
    context_size = min(CONTEXT, len(prompt) + spare)
    ids = generate(gpt, torch.tensor([prompt]), n, context_size)
    assert ids.tolist() == [by_hand(gpt, prompt, n, context_size)]
    assert ids.dtype == torch.long


def test_rows_of_a_batch_are_those_of_single_calls(gpt):
    idx = torch.randint(V, (4, 5), generator=torch.Generator().manual_seed(0))
    together = generate(gpt, idx, 15, CONTEXT)
    assert together.tolist() == [by_hand(gpt, row.tolist(), 15, CONTEXT) for row in idx]


def test_the_call_of_the_books_readers(gpt):
    ids = generate(
        model=gpt, idx=torch.tensor([[1, 2, 3]]), max_new_tokens=6, context_size=CONTEXT, top_k=1, temperature=0.0
    )
    assert ids.tolist() == [by_hand(gpt, [1, 2, 3], 6, CONTEXT)]


GREEDY = [{"temperature": 1.0, "top_k": 1}, {"temperature": 1e-6}, {"temperature": 1.0, "top_p": 0.0}]


@pytest.mark.parametrize("knobs", GREEDY, ids=str)
def test_roads_to_greedy(gpt, knobs):
    idx = torch.tensor([[3, 1, 4], [1, 5, 9]])
    assert torch.equal(generate(gpt, idx, 10, CONTEXT, **knobs), generate(gpt, idx, 10, CONTEXT))


def test_no_new_tokens_is_the_prompt_and_no_call():
    model, idx = Counter(), torch.tensor([[1, 2]])
    ids = generate(model, idx, 0, 8)
    assert torch.equal(ids, idx) and model.seen == [] and list(stream(model, idx, 0, 8)) == []


def test_the_prompt_is_left_as_it_is():
    idx = torch.tensor([[1, 2]])
    generate(Counter(), idx, 5, 8)[0, 0] = 9
    assert idx.tolist() == [[1, 2]]


def test_one_call_a_token_and_the_window_slides():
    model = Counter()
    assert generate(model, torch.tensor([[1, 2, 3]]), 6, 5).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert [length for length, *_ in model.seen] == [3, 4, 5, 5, 5, 5]


# ---------------------------------------------------------------- the end of a row


@pytest.mark.parametrize("eos", [7, {7}, [7], (7, 99), frozenset({7, 20})])
def test_generation_stops_at_the_end_and_no_call_is_wasted(eos):
    model = Counter()
    assert generate(model, torch.tensor([[4]]), 30, 50, eos_id=eos).tolist() == [[4, 5, 6, 7]]
    assert len(model.seen) == 3


@pytest.mark.parametrize("eos", [None, set(), ()])
def test_without_an_end_it_runs_to_the_limit(eos):
    assert generate(Counter(), torch.tensor([[4]]), 5, 50, eos_id=eos).tolist() == [[4, 5, 6, 7, 8, 9]]


def test_token_zero_can_be_the_end():
    assert generate(Counter(), torch.tensor([[V - 2]]), 9, 50, eos_id=0).tolist() == [[V - 2, V - 1, 0]]


def test_rows_end_apart_and_repeat_their_own_end():
    ids = generate(Counter(), torch.tensor([[1], [4], [9]]), 10, 50, eos_id={5, 11})
    assert ids.tolist() == [[1, 2, 3, 4, 5], [4, 5, 5, 5, 5], [9, 10, 11, 11, 11]]


def test_an_end_inside_the_prompt_ends_nothing():
    assert generate(Counter(), torch.tensor([[5, 5]]), 3, 50, eos_id=5).tolist() == [[5, 5, 6, 7, 8]]


def test_an_ended_row_stays_ended_when_sampling(gpt):
    idx = torch.randint(V, (8, 2), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    ids = generate(gpt, idx, 40, CONTEXT, temperature=2.0, eos_id={3, 4, 5}, generator=generator)
    for row in ids[:, 2:].tolist():
        ends = [i for i, token in enumerate(row) if token in {3, 4, 5}]
        assert not ends or set(row[ends[0] :]) == {row[ends[0]]}


# ---------------------------------------------------------------- the stream


def test_a_stream_hands_over_each_token_before_the_next_is_computed():
    model = Counter()
    steps = stream(model, torch.tensor([[1], [2]]), 3, 10)
    first = next(steps)
    assert first.tolist() == [[2], [3]] and len(model.seen) == 1
    assert [step.tolist() for step in steps] == [[[3], [4]], [[4], [5]]]


def test_generate_is_the_prompt_and_the_stream(gpt):
    idx = torch.tensor([[1, 2], [3, 4]])
    knobs = {"temperature": 0.9, "top_k": 8, "top_p": 0.9}
    steps = stream(gpt, idx, 9, CONTEXT, **knobs, generator=torch.Generator().manual_seed(2))
    whole = generate(gpt, idx, 9, CONTEXT, **knobs, generator=torch.Generator().manual_seed(2))
    assert torch.equal(torch.cat([idx, *steps], dim=1), whole)


# ---------------------------------------------------------------- sampling


def test_sampling_is_the_loop_by_hand(gpt):
    knobs = {"temperature": 1.3, "top_k": 9, "top_p": 0.95}
    ids, generator = torch.tensor([[1, 2], [3, 4]]), torch.Generator().manual_seed(4)
    expected = ids
    for _ in range(14):
        with torch.no_grad():
            logits = gpt(expected[:, -CONTEXT:])[:, -1]
        expected = torch.cat([expected, sample(next_token_probs(logits, **knobs), generator)], dim=1)
    assert torch.equal(generate(gpt, ids, 14, CONTEXT, **knobs, generator=torch.Generator().manual_seed(4)), expected)


def test_a_seed_is_a_text(gpt):
    idx = torch.tensor([[1, 2]])
    texts = []
    for seed in (0, 0, 1):
        torch.randn(seed + 3)  # other draws in the program don't matter
        generator = torch.Generator().manual_seed(seed)
        texts.append(generate(gpt, idx, 30, CONTEXT, temperature=1.5, generator=generator).tolist())
    assert texts[0] == texts[1] != texts[2]


def test_without_a_generator_torchs_own_seed_counts(gpt):
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(generate(gpt, torch.tensor([[1, 2]]), 30, CONTEXT, temperature=1.5).tolist())
    assert texts[0] == texts[1] != texts[2]


def test_greedy_draws_no_random_number(gpt):
    state = torch.get_rng_state()
    generate(gpt, torch.tensor([[1, 2]]), 5, CONTEXT)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_of_a_batch_are_drawn_apart(gpt):
    rows = generate(gpt, torch.tensor([[1, 2]] * 6), 20, CONTEXT, temperature=2.0)
    assert len({tuple(row) for row in rows.tolist()}) > 1


# ---------------------------------------------------------------- modes and gradients


def test_it_runs_in_eval_mode_without_gradients_and_puts_each_mode_back(gpt):
    model = copy.deepcopy(gpt).train()
    model.trf_blocks[0].eval()  # a part that someone froze
    modes = [part.training for part in model.modules()]
    idx = torch.tensor([[1, 2]])
    assert torch.equal(generate(model, idx, 9, CONTEXT), generate(gpt, idx, 9, CONTEXT))
    assert [part.training for part in model.modules()] == modes and torch.is_grad_enabled()

    counter = Counter().train()
    generate(counter, torch.tensor([[1]]), 2, CONTEXT)
    assert [(training, grad) for _, training, grad in counter.seen] == [(False, False)] * 2 and counter.training


def test_between_two_tokens_the_model_is_the_callers():
    model = Counter().train()
    steps = stream(model, torch.tensor([[1]]), 3, CONTEXT)
    next(steps)
    assert model.training and torch.is_grad_enabled()  # also while a half-read stream waits


def test_modes_come_back_after_an_error():
    class Broken(Counter):
        def forward(self, idx):
            raise RuntimeError("broken")

    model = Broken().train()
    with pytest.raises(RuntimeError, match="broken"):
        generate(model, torch.tensor([[1]]), 1, CONTEXT)
    assert model.training and torch.is_grad_enabled()
    with evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
    assert model.training


def test_generated_text_can_be_trained_on(gpt):
    model = copy.deepcopy(gpt).train()
    ids = generate(model, torch.tensor([[1, 2]]), 5, CONTEXT)
    model(ids).sum().backward()  # tensors made under inference_mode would be refused here
    assert model.tok_emb.weight.grad is not None


# ---------------------------------------------------------------- bad input


def test_a_prompt_longer_than_the_context_is_refused_in_one_line():
    model = Counter()
    with pytest.raises(ContextError, match="prompt has 6 tokens, the context 5: shorten") as caught:
        generate(model, torch.zeros(1, 6, dtype=torch.long), 1, 5)
    assert "\n" not in str(caught.value) and model.seen == []
    assert generate(model, torch.zeros(1, 5, dtype=torch.long), 1, 5).shape == (1, 6)


@pytest.mark.parametrize("shape", [(0,), (3,), (1, 0), (1, 2, 3)])
def test_a_prompt_must_be_a_batch_of_rows(shape):
    with pytest.raises(InputError, match="prompt has shape"):
        generate(Counter(), torch.zeros(shape, dtype=torch.long), 1, 5)


TOO_SMALL = [(-1, 5, "max_new_tokens"), (1, 0, "context_size"), (1, -3, "context_size")]


@pytest.mark.parametrize("n, context_size, name", TOO_SMALL)
def test_numbers_out_of_range(n, context_size, name):
    with pytest.raises(InputError, match=f"^{name} is -?[0-9]: give"):
        generate(Counter(), torch.tensor([[1]]), n, context_size)


def test_a_context_size_larger_than_the_models_is_caught_by_the_model(gpt):
    with pytest.raises(ContextError, match="13 tokens"):
        generate(gpt, torch.tensor([[1] * 12]), 2, 100)


def test_broken_weights_are_reported_and_not_drawn_from(gpt):
    model = copy.deepcopy(gpt)
    model.final_norm.weight.data[0] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="NaN"):
            generate(model, torch.tensor([[1]]), 1, CONTEXT, temperature=temperature)


# ---------------------------------------------------------------- text


class Letters:
    def encode(self, text):
        return [ord(c) - 97 for c in text]

    def decode(self, ids):
        return "".join(chr(i + 97) for i in ids)


class LettersWithBOS(Letters):
    bos_id = 0  # a falsy id is an id too

    def encode(self, text, bos=False):
        return [0] * bos + super().encode(text)


class LettersWithoutBOSOnPurpose(Letters):
    bos_id = None


def test_text_becomes_a_batch_of_one_with_bos_where_there_is_one():
    tokenizers = (Letters(), LettersWithBOS(), LettersWithoutBOSOnPurpose())
    for tokenizer, expected in zip(tokenizers, ([[2, 3]], [[0, 2, 3]], [[2, 3]])):
        ids = text_to_token_ids("cd", tokenizer)
        assert ids.tolist() == expected and ids.dtype == torch.long
    nothing = text_to_token_ids("", Letters())
    assert nothing.shape == (1, 0) and nothing.dtype == torch.long


@pytest.mark.parametrize("ids", [[2, 3], torch.tensor([2, 3]), torch.tensor([[2, 3]]), torch.tensor([[2, 3]]).int()])
def test_one_row_of_ids_becomes_text(ids):
    assert token_ids_to_text(ids, Letters()) == "cd"


def test_nothing_becomes_nothing():
    assert token_ids_to_text([], Letters()) == token_ids_to_text(torch.zeros(1, 0, dtype=torch.long), Letters()) == ""


@pytest.mark.parametrize("ids", [torch.zeros(2, 3), torch.zeros(1, 1, 1), torch.tensor(3), [[1, 2], [3, 4]]])
def test_several_rows_are_refused(ids):
    with pytest.raises(InputError, match="one row at a time"):
        token_ids_to_text(ids, Letters())


def test_ids_go_to_the_tokenizer_as_plain_numbers():
    kinds = types.SimpleNamespace(decode=lambda ids: {type(i) for i in ids})
    assert token_ids_to_text(torch.tensor([[1, 2]]), kinds) == {int}


def test_there_and_back(gpt):
    ids = generate(gpt, text_to_token_ids("abc", Letters()), 8, CONTEXT)
    assert token_ids_to_text(ids, Letters()).startswith("abc") and len(token_ids_to_text(ids, Letters())) == 11
