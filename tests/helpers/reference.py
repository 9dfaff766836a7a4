"""The slow twins: each formula in float64, with loops, and without any code of the package."""

import copy
import math

import torch


def divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the divergence of two rows of logits `(V,)`, nats, scalar."""
    log_p, log_q = torch.log_softmax(student_logits, -1), torch.log_softmax(teacher_logits, -1)
    p, q = log_p.exp(), log_q.exp()
    if beta == 0.0:
        return (q * (log_q - log_p)).sum()
    if beta == 1.0:
        return (p * (log_p - log_q)).sum()
    mixture = (1 - beta) * p + beta * q
    return beta * (q * (log_q - mixture.log())).sum() + (1 - beta) * (p * (log_p - mixture.log())).sum()


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy of a row of logits `(V,)`, nats, scalar."""
    log_p = torch.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum()


def head_logits(hidden: torch.Tensor, head) -> torch.Tensor:
    """Return the logits of one hidden state `(H,)` under an LM head, `(V,)`."""
    logits = head.weight.double() @ hidden.double()
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def weights(ids: list[list[int]], rocks: set[int], rock_weight: float, window: int, mask: list[list[bool]]):
    """Return the weight of each position, nested lists of the shape of `ids`."""
    result = []
    for row, inside in zip(ids, mask, strict=True):
        rock_places = [t for t, id in enumerate(row) if inside[t] and id in rocks]
        chosen = {t + offset for t in rock_places for offset in range(-window, window + 1)}
        result.append([(rock_weight if t in chosen else 1.0) if inside[t] else 0.0 for t in range(len(row))])
    return result


def unpadded(batch, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the prompt and the completion of a rollout of a batch."""
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
    return prompt, batch["completion_ids"][row][batch["completion_mask"][row].bool()]


def token_divergences(student, teacher, inputs, *, beta: float, temperature: float, vocab: int) -> list[list]:
    """Return the divergence at each position of the loss mask, rows of scalars with a graph to `student`.

    Each rollout runs alone, unpadded, through both whole models in float64: position t of the completion is read where
    the models see everything before it and predict it.
    """
    result = []
    for row in range(len(inputs["completion_ids"])):
        prompt, completion = unpadded(inputs, row)
        ids = torch.cat([prompt, completion])[None]
        student_logits = student(input_ids=ids).logits[0]
        with torch.no_grad():
            teacher_logits = teacher(input_ids=ids).logits[0]
        values = []
        for t in range(len(completion)):
            if "tool_mask" in inputs and not inputs["tool_mask"][row, t]:
                continue
            place = len(prompt) + t - 1
            pair = (student_logits[place, :vocab] / temperature, teacher_logits[place, :vocab] / temperature)
            values.append(divergence(*pair, beta))
        result.append(values)
    return result


def loss_and_gradient(student, teacher, inputs, weight_rows, denominator, *, beta=1.0, temperature=1.0, vocab=None):
    """Return the weighted loss and the gradient of every trainable parameter by name, in float64."""
    student, teacher = copy.deepcopy(student).double().eval(), copy.deepcopy(teacher).double().eval()
    student.zero_grad()
    values = token_divergences(student, teacher, inputs, beta=beta, temperature=temperature, vocab=vocab)
    total = sum(w * d for ws, ds in zip(weight_rows, values, strict=True) for w, d in zip(ws, ds, strict=True))
    loss = total / denominator
    loss.backward()
    return loss.item(), {name: p.grad for name, p in student.named_parameters() if p.requires_grad}


def relative_error(found: dict, expected: dict) -> float:
    """Return ‖found - expected‖ / ‖expected‖ over all tensors of two dictionaries; an absent gradient is zero."""
    difference = size = 0.0
    for name, value in expected.items():
        value = torch.zeros(1) if value is None else value.double()
        other = torch.zeros_like(value) if found.get(name) is None else found[name].double()
        difference += (other - value).pow(2).sum().item()
        size += value.pow(2).sum().item()
    return math.sqrt(difference / size) if size else math.sqrt(difference)


def context_figures(rows: list[dict], *, tau_pre, tau_post, window: int, gamma: float, eta: float) -> dict[int, dict]:
    """Return count, R, |O_PH|, CCR and R_ctx of each token type of `rows`, by the definition, pair by pair.

    A row has `rollout`, `position`, `token_id`, `kl` and perhaps `kl_pre`; thresholds are in nats.
    """
    token_at = {(row["rollout"], row["position"]): row["token_id"] for row in rows}

    def surroundings(row) -> dict:
        found = {}
        for offset in range(-window, window + 1):
            steps = range(1, offset + 1) if offset > 0 else range(offset, 0)
            places = [(row["rollout"], row["position"] + step) for step in steps]
            # A completion's end, or a token that is missing on the way, ends the window.
            if offset and all(place in token_at for place in places):
                found[offset, token_at[row["rollout"], row["position"] + offset]] = 1.0 / abs(offset)
        return found

    def similarity(one: dict, other: dict) -> float:
        if not one or not other:
            return 0.0
        lengths = [math.sqrt(sum(value**2 for value in vector.values())) for vector in (one, other)]
        return sum(value * other.get(key, 0.0) for key, value in one.items()) / (lengths[0] * lengths[1])

    result = {}
    for type in sorted({row["token_id"] for row in rows}):
        own = [row for row in rows if row["token_id"] == type]
        high = [row for row in own if row["kl"] >= tau_post and (tau_pre is None or row["kl_pre"] >= tau_pre)]
        vectors = [surroundings(row) for row in high]
        kept = 0
        for place, vector in enumerate(vectors):
            others = vectors[:place] + vectors[place + 1 :]
            if others:
                share = sum(similarity(vector, other) >= gamma - 1e-9 for other in others) / len(others)
                kept += share >= eta - 1e-9
        score = sum(row["kl"] for row in own)
        result[type] = {"count": len(own), "score": score, "persistent": len(high), "ccr": kept / len(own)}
        result[type]["context_score"] = score * kept / len(own)
    return result
