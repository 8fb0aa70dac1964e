r"""How a memory reads as equations: what it writes at step t and what it answers, in LaTeX.

A rule is a list of lines `left &= right`; each optimizer has its own, filled in by the other choices.
"""

from __future__ import annotations

from ttr._choices import (
    L2,
    Exact,
    GradientDescent,
    Hebbian,
    Identity,
    Linear,
    LocalPolynomial,
    Loss,
    Mixture,
    Muon,
    Network,
    Optimizer,
    Probe,
    Regressor,
    Retention,
    Weights,
)


def update_rule(
    weights: Weights, regressor: Regressor, optimizer: Optimizer, loss: Loss, retention: Retention
) -> list[str]:
    """The lines of the memory that these choices make."""
    if isinstance(regressor, LocalPolynomial):
        return _local(weights, regressor.degree, optimizer)
    if isinstance(regressor, Mixture):
        return _mixture(weights)
    identity = isinstance(regressor.feature_map, Identity)
    phi = "%s" if identity else r"\phi(%s)"
    if isinstance(optimizer, Hebbian):
        lines = _hebbian(weights, optimizer, phi)
    elif isinstance(optimizer, Exact):
        lines = _exact(weights, optimizer, phi)
    elif isinstance(optimizer, GradientDescent) and isinstance(regressor, Linear) and optimizer.batch == 1:
        lines = _gradient_descent(weights, optimizer, loss, phi)
    else:
        lines = _network(weights, regressor, optimizer, loss, retention)
    return lines if identity else [*lines, rf"\phi(x) &= {regressor.feature_map.formula}"]


def _hebbian(weights: Weights, optimizer: Hebbian, phi: str) -> list[str]:
    key, past, query = (phi % name for name in ("k_t", "k_i", "q_t"))
    if weights.recursive:
        memory = rf"{weights.old}S_{{t-1}} + {weights.new}{key} v_t^\top"
        total = rf"{weights.old}z_{{t-1}} + {weights.new}{key}"
    else:
        memory, total = (rf"\sum_{{i\le t}} \gamma_i^{{(t)}} {past}{value}" for value in (r" v_i^\top", ""))
    lines = [f"S_t &= {memory}"]
    if not weights.recursive:
        lines.append(rf"\gamma_i^{{(t)}} &= {weights.formula}")
    if not optimizer.normalize:
        return [*lines, rf"y_t &= S_t^\top {query}"]
    divisor = rf"z_t^\top {query}"
    if optimizer.floor:
        divisor = rf"\max\bigl(|{divisor}|,\, {optimizer.floor:g}\bigr)"
    return [*lines, f"z_t &= {total}", rf"y_t &= S_t^\top {query} \big/ {divisor}"]


def _exact(weights: Weights, optimizer: Exact, phi: str) -> list[str]:
    past, query = phi % "k_i", phi % "q_t"
    ridge = r"\gamma_0^{(t)} \Lambda" if optimizer.ridge_decays and weights.old else r"\Lambda"
    moment = rf"\sum_{{i\le t}} \gamma_i^{{(t)}} {past} {past}^\top + {ridge}"
    fit = rf"\Bigl({moment}\Bigr)^{{-1}} \sum_{{i\le t}} \gamma_i^{{(t)}} {past} v_i^\top"
    return [f"S_t &= {fit}", rf"\gamma_i^{{(t)}} &= {weights.formula}", rf"y_t &= S_t^\top {query}"]


def _gradient_descent(weights: Weights, optimizer: GradientDescent, loss: Loss, phi: str) -> list[str]:
    several = optimizer.steps > 1
    step = "t,j" if several else "t"
    key, value, gain = phi % f"k_{{{step}}}", f"v_{{{step}}}", f"g_{{{step}}}"
    formula = optimizer.gain.formula.replace("k_t", key).replace("k_i", phi % "k_i").replace("_t", f"_{{{step}}}")
    before = "S" if several else r"\bar S_t" if weights.old else "S_{t-1}"
    # The weight of a new pair scales the step wherever the step stands.
    formula = formula.replace(r"\beta", weights.new + r"\beta")
    error = loss.influence % rf"\bigl({value} - {before}^\top {key}\bigr)"
    correction = rf"{gain} {error}^\top"
    if several:
        lines = [
            rf"S &\leftarrow {weights.old}S_{{t-1}}",
            rf"S &\leftarrow S + {correction} \quad (j = 1, \dots, {optimizer.steps})",
            r"S_t &= S",
        ]
    else:
        lines = [rf"\bar S_t &= {weights.old}S_{{t-1}}"] if weights.old else []
        if optimizer.momentum:
            lines += [rf"M_t &= \eta_t M_{{t-1}} + {correction}", f"S_t &= {before} + M_t"]
        else:
            lines += [f"S_t &= {before} + {correction}"]
    return [*lines, f"{gain} &= {formula}", rf"y_t &= S_t^\top {phi % 'q_t'}"]


def _network(
    weights: Weights, regressor: Regressor, optimizer: Optimizer, loss: Loss, retention: Retention
) -> list[str]:
    """Steps along the gradient of what is not linear in its weights, or not in those of the step before."""
    matrix = "W" if isinstance(regressor, Network) else "S"
    mirrored = not isinstance(retention, L2)
    stepped = "A" if mirrored else matrix
    batch, average = getattr(optimizer, "batch", 1), getattr(optimizer, "average", False)
    if batch == 1:
        left = rf"{weights.old}{stepped}_{{t-1}}"
    elif weights.old:
        left = rf"{weights.old}\bar {stepped}_{{t-1}}, \quad \bar {stepped}_b = {stepped}_b"
    else:
        left = rf"{stepped}_b"
    lines = [rf"\bar {stepped}_t &= {left}"]
    if batch > 1:
        lines.append(rf"b &= {batch} \lfloor (t-1)/{batch} \rfloor")
    if mirrored:
        lines.append(rf"\bar {matrix}_t &= \nabla\Phi(\bar A_t)")

    def gradient(i: str) -> str:
        return rf"\nabla\ell\bigl(v_{i} - m(k_{i}; \bar {matrix}_t)\bigr)"

    momentum = isinstance(optimizer, Muon) or (isinstance(optimizer, GradientDescent) and optimizer.momentum)
    if isinstance(optimizer, Muon):
        weight = weights.new.replace("_t", "_i")
        window = rf"\textstyle\sum_{{i > t - {optimizer.window}}} {weight}{gradient('i')}"
        lines.append(rf"Z_t &= \eta_t Z_{{t-1}} - {window}")
        step = r"+ \beta_t \operatorname{NS}(Z_t)"
    elif momentum:
        lines.append(rf"Z_t &= \eta_t Z_{{t-1}} - {weights.new}\beta_t {gradient('t')}")
        step = "+ Z_t"
    else:
        step = rf"- {weights.new}\beta_t {gradient('t')}"
    if batch == 1:
        lines.append(rf"{stepped}_t &= \bar {stepped}_t {step}")
    elif average:
        written = rf"\Sigma_t &= {weights.old}\Sigma_{{t-1}} {step}, \quad \Sigma_b = 0"
        lines += [written, rf"{stepped}_t &= \bar {stepped}_t + \Sigma_t / (t - b)"]
    else:
        lines.append(rf"{stepped}_t &= {weights.old}{stepped}_{{t-1}} {step}")
    if mirrored:
        lines += [rf"{matrix}_t &= \nabla\Phi(A_t)", rf"\nabla\Phi(A) &= {retention.formula}"]
    formula = regressor.formula
    if isinstance(regressor.feature_map, Identity):
        formula = formula.replace(r"\phi(k)", "k")
    return [
        *lines,
        rf"m(k; {matrix}) &= {formula}",
        rf"\ell(e) &= {loss.formula}",
        rf"y_t &= m(q_t; {matrix}_t)",
    ]


def _mixture(weights: Weights) -> list[str]:
    old = rf"{weights.old}w_{{t-1, jd}}"
    return [
        rf"\delta_{{jd}} &= v_{{td}} - \bar w_{{jd}}^\top k_t, \quad \bar w_{{jd}} = {old}",
        r"r_{jd} &\propto \pi_{jd}(k_t)\, e^{-\delta_{jd}^2 / 2}, \quad \textstyle\sum_j r_{jd} = 1",
        rf"w_{{t, jd}} &= \bar w_{{jd}} + {weights.new}\beta_t\, r_{{jd}}\, \delta_{{jd}}\, k_t",
        r"y_{td} &= \textstyle\sum_j \pi_{jd}(q_t)\, w_{t, jd}^\top q_t",
    ]


def _local(weights: Weights, degree: int, optimizer: Optimizer) -> list[str]:
    lines = [rf"w_i &\propto {weights.formula}"]
    if isinstance(optimizer, Probe):
        return [r"y_t &= \mathbb E_w v + \operatorname{Cov}_w(v, k)\, r_t", *lines]
    if degree == 0:
        return [r"y_t &= \sum_{i\le t} w_i v_i", *lines]
    if degree == 1:
        slope = r"\operatorname{Cov}_w(v, k)\,(\operatorname{Cov}_w(k, k) + \lambda I)^{-1}(q_t - \mathbb E_w k)"
        return [rf"y_t &= \mathbb E_w v + {slope}", *lines]
    fit = r"\sum_{i\le t} w_i \lVert v_i - c - B\,\psi(k_i - q_t)\rVert^2 + \lambda\lVert B\rVert^2"
    return [rf"y_t &= \arg\min_c \min_B {fit}", r"\psi(x) &= [x,\, \operatorname{vech}(x x^\top)]", *lines]
