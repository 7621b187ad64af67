"""Reference implementations of the policy losses, in scalar fp64 Python.

They take one completion and one token at a time, as the papers' equations do.

The policy is a softmax over a vocabulary of its own for every token: theta[i][t] is a list of
logits. `frozen` is theta where an equation has a stop-gradient; finite differences move theta
only.
"""

import math


def logp(theta, case, i, t):
    """Returns the log-probability of token t of completion i."""
    logits = theta[i][t]
    top = max(logits)
    return logits[case.tokens[i][t]] - top - math.log(sum(math.exp(x - top) for x in logits))


def clamp(x, low, high):
    return max(low, min(high, x))


def token_loss(name, theta, frozen, case, rl, i, t):
    """Returns minus the term that the paper maximises, for token t of completion i."""
    advantage, old = case.advantages[i], case.old[i]
    lp = logp(theta, case, i, t)
    r = math.exp(lp - old[t])
    low, high = 1 - rl.epsilon, 1 + rl.epsilon_high
    if name == "clip":  # 2402.03300 eq. 3, 2503.14476 eq. 8
        value = min(r * advantage, clamp(r, low, high) * advantage)
        if rl.delta is not None and advantage < 0:  # 1912.09729
            value = max(value, rl.delta * advantage)
        return -value
    if name == "gspo":  # 2507.18071 eq. 5 to 7: the ratio of the whole completion, no sg
        length = len(old)
        s = math.exp(sum(logp(theta, case, i, u) - old[u] for u in range(length)) / length)
        value = min(s * advantage, clamp(s, low, high) * advantage)
        if rl.delta is not None and advantage < 0:
            value = max(value, rl.delta * advantage)
        return -value
    if name == "sapo":  # 2511.20347 eq. 5 and 6
        tau = rl.sapo_temperature_pos if advantage > 0 else rl.sapo_temperature_neg
        return -(4 / tau) / (1 + math.exp(-tau * (r - 1))) * advantage
    if name == "cispo":  # 2506.13585 eq. 4 and 5
        weight = clamp(math.exp(logp(frozen, case, i, t) - old[t]), low, high)
        return -weight * advantage * lp
    assert name == "reinforce"  # 2402.14740
    return -advantage * lp


def kl(theta, case, estimator, i, t):
    """Returns the estimate of the divergence from the reference at token t of completion i."""
    d = case.ref[i][t] - logp(theta, case, i, t)
    return {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}[estimator]


def entropy(logits):
    """Returns the entropy of the softmax of one position's logits, in nats."""
    masses = [math.exp(x) for x in logits]
    shares = [mass / sum(masses) for mass in masses]
    return -sum(p * math.log(p) for p in shares)


def loss(theta, frozen, case, rl):
    """Returns the loss of the whole minibatch."""
    per_completion = []
    for i, old in enumerate(case.old):
        terms = []
        for t in range(len(old)):
            term = token_loss(rl.policy_loss, theta, frozen, case, rl, i, t)
            if case.rollout is not None:
                if rl.rollout_is == "token":
                    drift = old[t] - case.rollout[i][t]
                else:
                    drift = sum(o - r for o, r in zip(old, case.rollout[i], strict=True))
                weight, high = math.exp(drift), rl.rollout_is_threshold
                low = rl.rollout_is_threshold_low
                if rl.rollout_is_mode == "mask":
                    term *= weight if low <= weight <= high else 0.0
                else:
                    term *= min(weight, high)
            if rl.entropy_coef:
                term -= rl.entropy_coef * entropy(theta[i][t])
            if rl.beta and not rl.use_kl_in_reward:
                term += rl.beta * kl(theta, case, rl.kl_estimator, i, t)
            terms.append(term)
        per_completion.append(terms)
    n = len(per_completion)
    if rl.loss_agg_mode == "token-mean":
        return sum(map(sum, per_completion)) / sum(map(len, per_completion))
    if rl.loss_agg_mode == "seq-mean-token-mean":
        return sum(sum(terms) / len(terms) for terms in per_completion) / n
    if rl.loss_agg_mode == "seq-mean-token-sum":
        return sum(map(sum, per_completion)) / n
    return sum(sum(terms) / rl.max_completion_length for terms in per_completion) / n


def gradient(theta, case, rl, step=1e-5):
    """Returns central differences in every logit, in the order of theta."""
    frozen = [[list(logits) for logits in completion] for completion in theta]
    out = []
    for completion in theta:
        for logits in completion:
            for v, kept in enumerate(logits):
                sides = []
                for sign in (1, -1):
                    logits[v] = kept + sign * step
                    sides.append(loss(theta, frozen, case, rl))
                logits[v] = kept
                out.append((sides[0] - sides[1]) / (2 * step))
    return out
