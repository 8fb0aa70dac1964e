// The one-dimensional regression explorer of book/explorer.md.
//
// Every memory here is a linear smoother: its prediction is y(q) = Σ_i ℓ_i(q) v_i, and ℓ depends on the keys alone.
// So a memory is one function, keys -> (query -> ℓ); the curve, its error and the second panel all follow from it.
// The first half of the file is pure (the stream, the features, the memories, the link), the second half draws.
(() => {
  "use strict";

  // ------------------------------------------------------------------------------------------------ the stream

  const STREAM_LENGTH = 40;
  const MOST_PAIRS = 80; // the reader's own pairs included
  const NOISE = 0.1;

  /** mulberry32 (Tommy Ettinger): uniform numbers in [0, 1) from a 32-bit seed, the same in every browser. */
  const uniformNumbers = (seed) => {
    let counter = seed;
    return () => {
      counter = (counter + 0x6d2b79f5) | 0;
      let bits = Math.imul(counter ^ (counter >>> 15), counter | 1);
      bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61);
      return ((bits ^ (bits >>> 14)) >>> 0) / 2 ** 32;
    };
  };

  const wave = (key) => Math.sin(Math.PI * key);
  const targets = {
    smooth: { label: "smooth curve", value: wave },
    step: { label: "step", value: (key) => (key < 0 ? -0.8 : 0.8) },
    line: { label: "line", value: (key) => 0.9 * key + 0.3 },
    switch: { label: "switch half-way", value: (key, time) => (time <= STREAM_LENGTH / 2 ? wave(key) : -wave(key)) },
  };

  const lengthOfStream = ({ written }) => Math.max(STREAM_LENGTH, ...Object.keys(written).map((i) => Number(i) + 1));

  /** The pairs seen so far, oldest first; a pair that the reader wrote replaces the one of its time. */
  const stream = ({ target, seed, seen, written }) => {
    const uniform = uniformNumbers(seed);
    return Array.from({ length: seen }, (_, i) => {
      const key = 2 * uniform() - 1;
      const noise = NOISE * Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
      const [k, v] = written[i] ?? [key, targets[target].value(key, i + 1) + noise];
      return { key: k, value: v };
    });
  };

  // ---------------------------------------------------------------------------------------------- the features

  const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
  const dot = (a, b) => sum(a.map((entry, i) => entry * b[i]));
  const scaled = (factor, a) => a.map((entry) => factor * entry);

  const CENTRES = Array.from({ length: 9 }, (_, j) => j / 4 - 1);
  const BUMP_WIDTH = 0.25;
  const bumps = (key) => {
    const heights = CENTRES.map((centre) => Math.exp(-((key - centre) ** 2) / (2 * BUMP_WIDTH ** 2)));
    return scaled(1 / Math.hypot(...heights), heights);
  };
  const featureMaps = {
    line: { label: "φ(k) = [1, k]", map: (key) => [1, key] },
    bumps: { label: "Gaussian bumps", map: bumps },
  };

  // ---------------------------------------------------------------------------------------------- the memories

  const agesOf = (pairs) => pairs.map((_, i) => pairs.length - 1 - i);

  /** A memory y = Sᵀφ(q), from the state after one-hot values: its row i is what v_i will multiply. */
  const linearMemory = (stateOf) => (keys, choices) => {
    const { map } = featureMaps[choices.features];
    const state = stateOf(keys.map(map), choices);
    return (query) => {
      const feature = map(query);
      return state.map((row) => dot(row, feature));
    };
  };

  const hebbian = (features, { beta, decay }) =>
    agesOf(features).map((age, i) => scaled(beta * decay ** age, features[i]));

  const deltaRule = (features, { beta, decay }) =>
    features.reduce((state, feature) => {
      const corrected = state.map((row) => {
        const step = beta * dot(row, feature);
        return row.map((entry, j) => decay * (entry - step * feature[j]));
      });
      return [...corrected, scaled(beta, feature)];
    }, []);

  const leastSquares = (features, { decay, ridge }) => {
    const weighted = agesOf(features).map((age, i) => scaled(decay ** age, features[i]));
    const channels = [...features[0].keys()];
    // Gauss-Jordan elimination of [G + λI | weighted features]; without pivoting, since G + λI is positive definite.
    let rows = channels.map((a) => [
      ...channels.map((b) => dot(weighted.map((w) => w[a]), features.map((f) => f[b])) + (a === b ? ridge : 0)),
      ...weighted.map((w) => w[a]),
    ]);
    for (const a of channels) {
      const pivot = scaled(1 / rows[a][a], rows[a]);
      rows = rows.map((row, b) => (a === b ? pivot : row.map((entry, c) => entry - row[a] * pivot[c])));
    }
    return features.map((_, i) => rows.map((row) => row[channels.length + i]));
  };

  /** Gaussian weights times the decay, summing to one; the largest exponent is taken out so that none underflows. */
  const kernelWeights = (keys, { bandwidth, decay }, query) => {
    const exponents = agesOf(keys).map(
      (age, i) => age * Math.log(decay) - (query - keys[i]) ** 2 / (2 * bandwidth ** 2));
    const largest = Math.max(...exponents);
    const weights = exponents.map((exponent) => Math.exp(exponent - largest));
    return scaled(1 / sum(weights), weights);
  };

  const softmax = (keys, choices) => (query) => kernelWeights(keys, choices, query);

  const localLinear = (keys, choices) => (query) => {
    const weights = kernelWeights(keys, choices, query);
    const mean = dot(weights, keys);
    const variance = dot(weights, keys.map((key) => (key - mean) ** 2));
    const tilt = (query - mean) / (variance + choices.ridge);
    return weights.map((weight, i) => weight * (1 + tilt * (keys[i] - mean)));
  };

  const memories = {
    "linear-attention": { label: "linear attention", uses: ["features", "beta", "decay"], fit: linearMemory(hebbian) },
    delta: { label: "delta rule", uses: ["features", "beta", "decay"], fit: linearMemory(deltaRule) },
    "least-squares": {
      label: "exact least squares", uses: ["features", "ridge", "decay"], fit: linearMemory(leastSquares) },
    softmax: { label: "softmax attention", uses: ["bandwidth", "decay"], fit: softmax },
    "local-linear": { label: "local linear attention", uses: ["bandwidth", "ridge", "decay"], fit: localLinear },
  };

  /** ℓ(q) for each query: what every pair of the stream contributes per unit of its value. */
  const contributions = (choices, queries) =>
    queries.map(memories[choices.memory].fit(stream(choices).map((pair) => pair.key), choices));

  /** The prediction y(q) = Σ_i ℓ_i(q) v_i at each query. */
  const fit = (choices, queries) => {
    const values = stream(choices).map((pair) => pair.value);
    return contributions(choices, queries).map((weights) => dot(weights, values));
  };

  // ----------------------------------------------------------------------------- the choices, as a link holds them

  const menus = {
    memory: { label: "memory", options: memories, initial: "delta" },
    features: { label: "features", options: featureMaps, initial: "bumps" },
    target: { label: "target", options: targets, initial: "smooth" },
  };
  const sliders = {
    seen: { label: "pairs seen, t", min: 1, max: STREAM_LENGTH, step: 1, initial: STREAM_LENGTH },
    beta: { label: "step size β", min: 0, max: 2, step: 0.01, initial: 0.5 },
    decay: { label: "decay α", min: 0.5, max: 1, step: 0.01, initial: 1 },
    bandwidth: { label: "bandwidth h", min: 0.01, max: 10, logarithmic: true, initial: 0.15 },
    ridge: { label: "ridge λ", min: 0.0001, max: 100, logarithmic: true, initial: 0.001 },
    query: { label: "query q", min: -1, max: 1, step: 0.01, initial: 0.3 },
  };
  const controls = Object.entries({ ...menus, ...sliders });
  const initialChoices = {
    ...Object.fromEntries(controls.map(([name, { initial }]) => [name, initial])),
    seed: 1,
    written: {}, // the reader's own pairs: time -> [key, value]
  };

  const within = (low, number, high) => Math.min(high, Math.max(low, number));

  /** Only what differs from the start, so that a link says what it is about. */
  const hashOf = (choices) => {
    const differing = Object.entries(choices).filter(([name, choice]) => choice !== initialChoices[name]);
    const written = Object.entries(choices.written).map(([time, pair]) => [time, ...pair].join("_")).join("*");
    const { written: _, ...plain } = Object.fromEntries(differing);
    return new URLSearchParams({ ...plain, ...(written && { written }) }).toString();
  };

  const writtenPairs = (text) => {
    const rows = text.split("*").map((row) => row.split("_").map(parseFloat));
    const sound = ([time, key, value]) =>
      Number.isInteger(time) && time >= 0 && time < MOST_PAIRS && Math.abs(key) <= 1 && Math.abs(value) <= 2;
    return Object.fromEntries(rows.filter(sound).map(([time, key, value]) => [time, [key, value]]));
  };

  /** The choices a link asks for; what it leaves out, or asks in vain, stays as at the start. */
  const choicesOf = (hash) => {
    const asked = new URLSearchParams(hash);
    const choices = { ...initialChoices, written: writtenPairs(asked.get("written") ?? "") };
    for (const [name, { options, min, max }] of [...controls, ["seed", { min: 1, max: 2 ** 31 - 1 }]]) {
      const text = asked.get(name) ?? "";
      const number = parseFloat(text);
      if (options && Object.hasOwn(options, text)) choices[name] = text;
      if (!options && Number.isFinite(number)) choices[name] = within(min, number, name === "seen" ? MOST_PAIRS : max);
    }
    choices.seed = Math.round(choices.seed);
    choices.seen = Math.min(Math.round(choices.seen), lengthOfStream(choices));
    return choices;
  };

  // --------------------------------------------------------------------------------------------------- the page

  const root = document.getElementById("ttr-explorer");

  const optionHTML = ([name, { label }]) => `<option value="${name}">${label}</option>`;
  const menuHTML = ([name, { label, options }]) => `<div class="ttr-control"><label for="ttr-${name}">${label}</label>
    <select id="ttr-${name}">${Object.entries(options).map(optionHTML).join("")}</select></div>`;
  const sliderHTML = ([name, { label, min, max, step, logarithmic }]) => {
    const range = logarithmic ? [Math.log10(min), Math.log10(max), 0.01] : [min, max, step];
    return `<div class="ttr-control"><label for="ttr-${name}">${label} <span aria-hidden="true"></span></label>
      <input type="range" id="ttr-${name}" min="${range[0]}" max="${range[1]}" step="${range[2]}"></div>`;
  };
  root.innerHTML = `<div class="ttr-body">
    <div class="ttr-menus">${Object.entries(menus).map(menuHTML).join("")}</div>
    <div class="ttr-plots">
      <div class="ttr-formulas"></div>
      <svg id="ttr-plot" role="img"><clipPath id="ttr-frame"><rect></rect></clipPath>
        <g class="ttr-axes"></g><g class="ttr-ticks"></g>
        <g clip-path="url(#ttr-frame)">
          <path id="ttr-target-curve"></path><path id="ttr-curve"></path><line class="ttr-query"></line>
          <g id="ttr-pairs"></g><circle id="ttr-prediction" r="6"></circle>
        </g></svg>
      <ul class="ttr-legend">
        <li><i class="ttr-key-pairs"></i>pairs, old to new</li> <li><i class="ttr-key-curve"></i>memory</li>
        <li><i class="ttr-key-target"></i>target</li> <li><i class="ttr-key-query"></i>query (drag it)</li></ul>
      <svg id="ttr-contributions" role="img"><g class="ttr-axes"></g><g class="ttr-ticks"></g>
        <line class="ttr-query"></line><g id="ttr-stems"></g></svg>
      <p class="ttr-readout" role="status"></p>
    </div>
    <div class="ttr-sliders">${Object.entries(sliders).map(sliderHTML).join("")}</div>
    <div class="ttr-actions">
      <button type="button" id="ttr-play">Play the stream</button>
      <button type="button" id="ttr-draw">New draw</button>
      <button type="button" id="ttr-reset">Start again</button>
      <form id="ttr-write"><label for="ttr-value">value</label>
        <input type="number" id="ttr-value" min="-2" max="2" step="0.1" value="1" required>
        <button>Write it at q</button></form>
    </div></div>`;
  const find = (selector) => root.querySelector(selector);
  const [plot, contributionPlot, readout, play] =
    ["#ttr-plot", "#ttr-contributions", ".ttr-readout", "#ttr-play"].map(find);
  // The formulas are ordinary page text, typeset with the rest, and readable where this script does not run.
  const formulas = [...document.querySelectorAll(".ttr-formula")];
  find(".ttr-formulas").append(...formulas);

  let choices = choicesOf(location.hash.slice(1));

  // ------------------------------------------------------------------------------------------------- the drawing

  const MARGIN = { left: 52, right: 14, top: 10, bottom: 40 };
  const GRID = Array.from({ length: 201 }, (_, i) => i / 100 - 1);
  const FAR_AWAY = 1e4; // pixels: a diverging memory leaves the frame by many orders of magnitude

  const minusSigned = (text) => String(text).replaceAll("-", "−");
  const decimals = (number, digits = 2) =>
    minusSigned(Math.abs(number) < 1e4 ? number.toFixed(digits) : number.toExponential(1));
  const tick = (number) => minusSigned(Math.abs(number) < 1e4 ? Number(number.toFixed(3)) : number.toExponential(0));
  /** The smallest of 1, 2, 5 times a power of ten that is not below the number. */
  const roundedUp = (number) => {
    const power = 10 ** Math.floor(Math.log10(number));
    return power * [1, 2, 5, 10].find((factor) => factor * power >= number);
  };

  const setAttributes = (element, { text, ...attributes }) => {
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
  };
  /** Give a group one mark for each row of attributes. Marks are kept, since a touch on a removed mark is lost. */
  const setMarks = (group, tag, rows) => {
    while (group.childElementCount > rows.length) group.lastElementChild.remove();
    rows.forEach((attributes, i) => setAttributes(
      group.children[i] ?? group.appendChild(document.createElementNS(group.namespaceURI, tag)), attributes));
  };

  /** Draw a panel's axes to fill its place on the page; return its scales, in pixels. */
  const framed = (svg, valueTicks, keyLabel, valueLabel) => {
    const [left, right, bottom] = [MARGIN.left, svg.clientWidth - MARGIN.right, svg.clientHeight - MARGIN.bottom];
    const highest = valueTicks.at(-1);
    const x = (key) => left + ((key + 1) / 2) * (right - left);
    const y = (value) => within(-FAR_AWAY, bottom - ((value / highest + 1) / 2) * (bottom - MARGIN.top), FAR_AWAY);
    const keyTicks = [-1, -0.5, 0, 0.5, 1];
    setMarks(svg.querySelector(".ttr-axes"), "line", [
      ...valueTicks.map((v) => ({ x1: left, x2: right, y1: y(v), y2: y(v), class: v === 0 ? "ttr-zero" : "" })),
      ...keyTicks.map((k) => ({ x1: x(k), x2: x(k), y1: bottom, y2: bottom + 5, class: "ttr-zero" })),
    ]);
    setMarks(svg.querySelector(".ttr-ticks"), "text", [
      ...valueTicks.map((v) => ({ x: left - 7, y: y(v) + 4, "text-anchor": "end", text: tick(v) })),
      ...keyTicks.map((k) => ({ x: x(k), y: bottom + 18, "text-anchor": "middle", text: tick(k) })),
      { x: x(0), y: bottom + 35, "text-anchor": "middle", class: "ttr-label", text: keyLabel },
      { transform: `translate(13 ${y(0)}) rotate(-90)`, "text-anchor": "middle", class: "ttr-label", text: valueLabel },
    ]);
    const query = x(choices.query);
    setAttributes(svg.querySelector(".ttr-query"), { x1: query, x2: query, y1: MARGIN.top, y2: bottom });
    return { x, y, left, right, bottom };
  };

  const pathThrough = (values, { x, y }) =>
    "M" + GRID.map((key, i) => `${x(key).toFixed(2)},${y(values[i]).toFixed(2)}`).join("L");

  const drawControls = () => {
    const used = ["memory", "target", "seen", "query", ...memories[choices.memory].uses];
    find("#ttr-seen").max = lengthOfStream(choices);
    for (const [name, { options, logarithmic }] of controls) {
      const input = find(`#ttr-${name}`);
      input.disabled = !used.includes(name);
      input.value = logarithmic ? Math.log10(choices[name]) : choices[name];
      if (options) continue;
      const number = minusSigned(choices[name]);
      input.setAttribute("aria-valuetext", number);
      find(`label[for=ttr-${name}] span`).textContent = number;
    }
    for (const formula of formulas) formula.classList.toggle("ttr-chosen", formula.classList.contains(choices.memory));
    find("#ttr-write button").disabled = choices.seen === MOST_PAIRS;
  };

  const draw = () => {
    drawControls();
    const pairs = stream(choices);
    const [keys, values] = [pairs.map((pair) => pair.key), pairs.map((pair) => pair.value)];
    const contributionsAt = memories[choices.memory].fit(keys, choices);
    const target = GRID.map((key) => targets[choices.target].value(key, choices.seen));
    const curve = GRID.map((query) => dot(contributionsAt(query), values));
    const weights = contributionsAt(choices.query);
    const prediction = dot(weights, values);
    const shades = pairs.map((_, i) => (0.2 + (0.8 * (i + 1)) / pairs.length).toFixed(3));

    const upper = framed(plot, [-2, -1, 0, 1, 2], "key / query", "value");
    setAttributes(find("#ttr-frame rect"), { x: upper.left - 7, y: MARGIN.top,
      width: Math.max(0, upper.right - upper.left + 14), height: upper.bottom - MARGIN.top });
    find("#ttr-target-curve").setAttribute("d", pathThrough(target, upper));
    find("#ttr-curve").setAttribute("d", pathThrough(curve, upper));
    setAttributes(find("#ttr-prediction"), { cx: upper.x(choices.query), cy: upper.y(prediction) });
    setMarks(find("#ttr-pairs"), "circle", pairs.map(({ key, value }, i) => (
      { cx: upper.x(key), cy: upper.y(value), r: 4.5, "fill-opacity": shades[i], "data-time": i })));

    const largest = Math.max(...weights.map(Math.abs));
    const top = roundedUp(Math.max(largest, 0.001));
    const lower = framed(contributionPlot, [-top, 0, top], "key of the pair", "contribution");
    setMarks(find("#ttr-stems"), "line", pairs.map(({ key }, i) => (
      { x1: lower.x(key), x2: lower.x(key), y1: lower.y(0), y2: lower.y(weights[i]), opacity: shades[i] })));

    const error = Math.sqrt(sum(curve.map((y, i) => (y - target[i]) ** 2)) / GRID.length);
    readout.textContent = `Root-mean-square error against the target: ${decimals(error, 3)}. ` +
      `Prediction at q = ${decimals(choices.query)}: ${decimals(prediction)}. ` +
      `The contributions sum to ${decimals(sum(weights))}.` +
      (curve.some((y) => Math.abs(y) > 2) ? " The curve leaves the frame." : "");
    plot.setAttribute("aria-label",
      `${memories[choices.memory].label}: prediction for each query, with ${pairs.length} pairs and the target.`);
    contributionPlot.setAttribute("aria-label",
      `Contribution of each pair to the prediction at q = ${decimals(choices.query)}, at most ${decimals(largest, 3)}.`);
  };

  // ------------------------------------------------------------------------------------------- what the reader does

  const change = (changes) => {
    choices = { ...choices, ...changes };
    draw();
  };
  /** Once a gesture and not once a step of it, since browsers limit how often an address may change. */
  const keepInLink = () => {
    const hash = hashOf(choices);
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  };
  const changeAndKeep = (changes) => {
    change(changes);
    keepInLink();
  };
  /** The reader's own pairs belong to the stream they were written into. */
  const forNewStream = () => ({ written: {}, seen: Math.min(choices.seen, STREAM_LENGTH) });

  for (const name of Object.keys(menus)) {
    find(`#ttr-${name}`).addEventListener("change", ({ target: menu }) =>
      changeAndKeep({ ...(name === "target" && forNewStream()), [name]: menu.value }));
  }
  for (const [name, { logarithmic }] of Object.entries(sliders)) {
    const slider = find(`#ttr-${name}`);
    const number = () => (logarithmic ? Number((10 ** slider.value).toPrecision(3)) : slider.valueAsNumber);
    slider.addEventListener("input", () => change({ [name]: number() }));
    slider.addEventListener("change", keepInLink);
  }
  find("#ttr-draw").addEventListener("click", () => changeAndKeep({ ...forNewStream(), seed: choices.seed + 1 }));
  find("#ttr-reset").addEventListener("click", () => changeAndKeep(initialChoices));

  let timer;
  const stopPlaying = () => {
    timer = clearInterval(timer);
    play.textContent = "Play the stream";
    readout.ariaLive = "polite";
    keepInLink();
  };
  play.addEventListener("click", () => {
    if (timer) return stopPlaying();
    play.textContent = "Pause";
    readout.ariaLive = "off"; // nobody can listen to five sentences a second
    change({ seen: 1 });
    timer = setInterval(() => {
      if (choices.seen < lengthOfStream(choices)) change({ seen: choices.seen + 1 });
      else stopPlaying();
    }, 200);
  });

  const placed = (key, value) => [within(-1, key, 1), within(-2, value, 2)].map((c) => Number(c.toFixed(2)));
  const write = (time, pair) => change({ written: { ...choices.written, [time]: pair } });
  const writeNext = (pair) => {
    if (choices.seen === MOST_PAIRS) return;
    write(choices.seen, pair);
    changeAndKeep({ seen: choices.seen + 1 });
  };
  find("#ttr-write").addEventListener("submit", (event) => {
    event.preventDefault();
    writeNext(placed(choices.query, find("#ttr-value").valueAsNumber));
  });

  /** [key, value] under the pointer. */
  const pointed = ({ clientX, clientY }) => {
    const box = plot.getBoundingClientRect();
    const across = (clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right);
    const down = (clientY - box.top - MARGIN.top) / (box.height - MARGIN.top - MARGIN.bottom);
    return placed(2 * across - 1, 2 - 4 * down);
  };
  for (const svg of [plot, contributionPlot]) {
    let follow = null;
    svg.addEventListener("pointerdown", (event) => {
      const { time } = event.target.dataset;
      follow = (pair) => (time === undefined ? change({ query: pair[0] }) : write(time, pair));
      svg.setPointerCapture(event.pointerId);
      if (time === undefined) follow(pointed(event));
    });
    svg.addEventListener("pointermove", (event) => follow?.(pointed(event)));
    svg.addEventListener("lostpointercapture", () => {
      follow = null;
      keepInLink();
    });
  }
  plot.addEventListener("dblclick", (event) => writeNext(pointed(event)));

  window.addEventListener("hashchange", () => {
    if (!location.hash.includes("=")) return; // an ordinary link to a heading
    change(choicesOf(location.hash.slice(1)));
    root.scrollIntoView();
    find("#ttr-memory").focus({ preventScroll: true });
  });
  new ResizeObserver(draw).observe(plot); // draws at once, and whenever the width changes

  window.ttrExplorer = {
    memories, featureMaps, targets, stream, contributions, fit, hashOf, choicesOf, get choices() { return choices; } };
})();
