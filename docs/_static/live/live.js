/* The page "Live": points are dragged, and ONNX Runtime Web decodes their vector here, step by step.
   The graphs beside this file are exported by docs/live.py: encoder.onnx, step.onnx (one inner step) and mlp.onnx. */

(async () => {
  const root = document.getElementById("live-decoder");
  const folder = new URL(".", document.currentScript.src);
  const SLOTS = 8, LATENT = 64, STEPS = 40; // as in docs/live.py; 40 steps are the decoder's in evaluation mode
  const COLOURS = ["#3b7dd8", "#e07b39", "#3f9e5f", "#b0529f", "#c9a227", "#2aa5b0", "#d1495b", "#7d828c"];
  const SVG = "http://www.w3.org/2000/svg";

  // The networks. Float64, so that rounding decides no ranks in the pool, and every step is PyTorch's.

  async function load() {
    const ort = await import(new URL("ort.wasm.bundle.min.mjs", folder));
    const file = async (name) => {
      const response = await fetch(new URL(name, folder));
      if (!response.ok) throw new Error(`${name}: ${response.status}`);
      return response;
    };
    let wasm = await (await file("ort-wasm-simd-threaded.wasm.gz")).arrayBuffer();
    if (new Uint8Array(wasm)[0] === 0x1f) { // still packed: no server or browser has unpacked it
      wasm = await new Response(new Blob([wasm]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
    }
    ort.env.wasm.wasmBinary = wasm;
    ort.env.wasm.numThreads = 1;
    const networks = {};
    for (const name of ["encoder", "mlp", "step"]) {
      const model = new Uint8Array(await (await file(`${name}.onnx`)).arrayBuffer());
      networks[name] = await ort.InferenceSession.create(model);
    }
    const tensor = (values, ...shape) => new ort.Tensor("float64", Float64Array.from(values), [1, ...shape]);
    return { networks, tensor };
  }

  let networks, tensor;
  try {
    ({ networks, tensor } = await load());
  } catch (error) {
    console.error(error);
    document.getElementById("live-why").textContent = location.protocol === "file:"
      ? "Browsers run WebAssembly only from a server: python -m http.server in this folder, then open the page from there."
      : `The runtime could not be loaded (${error.message}), so here is a film.`;
    return;
  }
  root.hidden = false;
  document.getElementById("live-instead").hidden = true;

  // What is shown: the points, the sets after each step so far, the step that is shown, the MLP's set.

  let points = [[-0.7, -0.5], [0.7, -0.5], [0, 0.75], [-0.35, 0.1], [0.4, 0.15]];
  let start = newStart(), vector, frames = [], shown = 0, mlp;

  function newStart() { // 0.1 times standard normal, as the decoder draws it
    const normal = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
    return Array.from({ length: 2 * SLOTS }, () => 0.1 * normal());
  }

  const asSet = (elements, mask) => ({ elements: [...elements.data], mask: [...mask.data] });

  async function encode() {
    const absent = SLOTS - points.length;
    const padded = {
      elements: tensor([...points.flat(), ...Array(2 * absent).fill(0)], SLOTS, 2),
      mask: tensor([...points.map(() => 1), ...Array(absent).fill(0)], SLOTS),
    };
    vector = (await networks.encoder.run(padded)).output;
    const output = await networks.mlp.run(padded);
    mlp = asSet(output.output_elements, output.output_mask);
    const zeros = Array(2 * SLOTS).fill(0);
    const state = {
      elements: tensor(start, SLOTS, 2), mask: tensor(Array(SLOTS).fill(0.5), SLOTS),
      velocity: tensor(zeros, SLOTS, 2), mask_velocity: tensor(zeros.slice(SLOTS), SLOTS),
    };
    frames = [{ ...asSet(state.elements, state.mask), state }];
  }

  async function step() {
    const last = frames.at(-1);
    const next = await networks.step.run({ ...last.state, z: vector });
    const state = {};
    for (const name of Object.keys(last.state)) state[name] = next[`next_${name}`];
    last.loss = next.loss.data[0];
    frames.push({ ...asSet(state.elements, state.mask), state });
  }

  let stale = true, asked = false, busy = false;

  async function update() { // one at a time; what is asked for meanwhile is done after
    asked = true;
    if (busy) return;
    busy = true;
    while (asked) {
      asked = false;
      if (stale) { stale = false; await encode(); }
      while (frames.length < shown + 2 && !stale) await step(); // one further: it gives the loss of the shown set
      if (!stale) draw();
      await new Promise(requestAnimationFrame);
    }
    busy = false;
  }

  function change() { stale = true; update(); }

  function show(number) { shown = number; update(); }

  // How far a set is from the points.

  function verdict(set) {
    const present = [...set.mask.keys()].filter((i) => set.mask[i] > 0.5);
    if (present.length !== points.length) return `${present.length} points instead of ${points.length}`;
    // The best matching, by dynamic programming: best[s] is the least sum for the first points and the subset s.
    const best = Array(1 << present.length).fill(Infinity);
    best[0] = 0;
    for (let s = 0; s < best.length; s++) {
      const [x, y] = points[s.toString(2).replaceAll("0", "").length] ?? [];
      present.forEach((slot, j) => {
        if (s & (1 << j)) return;
        const distance = Math.hypot(set.elements[2 * slot] - x, set.elements[2 * slot + 1] - y);
        best[s | (1 << j)] = Math.min(best[s | (1 << j)], best[s] + distance);
      });
    }
    return `points off by ${(best.at(-1) / points.length).toFixed(3)}`;
  }

  // Drawing. Elements of a slot have the slot's colour, and are as opaque as they are present.

  const add = (parent, name, attributes = {}) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return parent.appendChild(element);
  };

  const panels = [...root.querySelectorAll("svg")].map((svg) => ({
    svg,
    verdict: svg.parentElement.querySelector("output"),
    trails: COLOURS.map((stroke) => add(svg, "polyline", { class: "live-trail", stroke })),
    dots: COLOURS.map((fill) => add(svg, "circle", { class: "live-dot", r: 0.045, fill })),
    rings: [],
  }));

  function draw() {
    const sets = [frames[shown], mlp];
    panels.forEach((panel, which) => {
      const { elements, mask } = sets[which];
      while (panel.rings.length > points.length) panel.rings.pop().remove();
      while (panel.rings.length < points.length) panel.rings.push(newRing(panel.svg, panel.rings.length));
      panel.rings.forEach((ring, i) => place(ring, points[i], `Point ${i + 1}`));
      COLOURS.forEach((_, slot) => {
        const path = which === 0 ? frames.slice(0, shown + 1).map((frame) => frame.elements.slice(2 * slot, 2 * slot + 2)) : [];
        panel.trails[slot].setAttribute("points", path.join(" "));
        panel.trails[slot].style.opacity = 0.5 * mask[slot];
        panel.dots[slot].setAttribute("cx", elements[2 * slot]);
        panel.dots[slot].setAttribute("cy", elements[2 * slot + 1]);
        panel.dots[slot].style.opacity = mask[slot];
      });
      panel.verdict.textContent = verdict(sets[which]);
    });
    slider.max = Math.max(STEPS, frames.length - 2, shown);
    slider.value = shown;
    control("step-number").textContent = `step ${shown}, loss ${frames[shown].loss.toExponential(1)}`;
    control("add").disabled = points.length === SLOTS;
    control("remove").disabled = points.length === 1;
  }

  function place(ring, [x, y], name) {
    ring.setAttribute("transform", `translate(${x} ${y})`);
    ring.setAttribute("aria-label", `${name}, at ${x.toFixed(2)}, ${y.toFixed(2)}`);
  }

  // Points are dragged by mouse, pen or finger, or moved by the arrow keys.

  function move(i, x, y) {
    points[i] = [x, y].map((value) => Math.min(1, Math.max(-1, value)));
    panels.forEach((panel) => place(panel.rings[i], points[i], `Point ${i + 1}`));
    change();
  }

  function newRing(svg, i) {
    const point = add(svg, "g", { class: "live-ring", tabindex: 0, role: "button" });
    add(point, "circle", { r: 0.17, stroke: "none" }); // room for a finger
    add(point, "circle", { r: 0.085 });
    point.addEventListener("pointerdown", (event) => {
      point.setPointerCapture(event.pointerId);
      pause();
    });
    point.addEventListener("pointermove", (event) => {
      if (!point.hasPointerCapture(event.pointerId)) return;
      const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      move(i, x, y);
    });
    point.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (way) {
        const by = event.shiftKey ? 0.01 : 0.05;
        move(i, points[i][0] + by * way[0], points[i][1] + by * way[1]);
      } else if (event.key === "Delete" && points.length > 1) {
        points.splice(i, 1);
        change();
      } else return;
      event.preventDefault();
    });
    return point;
  }

  // Controls.

  function control(name) { return root.querySelector(`[data-live="${name}"]`); }

  const slider = control("slider");
  let timer;

  function pause() {
    clearInterval(timer);
    timer = undefined;
    control("play").textContent = "Play";
  }

  function play() {
    if (shown >= STEPS) shown = 0;
    control("play").textContent = "Pause";
    timer = setInterval(() => (shown < STEPS ? show(shown + 1) : pause()), 80);
  }

  const random = () => 1.8 * Math.random() - 0.9;
  const actions = {
    play: () => (timer ? pause() : play()),
    step: () => { pause(); show(shown + 1); },
    start: () => { start = newStart(); change(); },
    add: () => { points.push([random(), random()]); change(); },
    remove: () => { points.pop(); change(); },
    random: () => { points = points.map(() => [random(), random()]); change(); },
  };
  for (const [name, action] of Object.entries(actions)) control(name).addEventListener("click", action);
  slider.addEventListener("input", () => { pause(); show(Number(slider.value)); });

  root.state = () => ({ // for tests/docs/test_live.py
    points, start, shown, mlp, busy, frames: frames.map(({ elements, mask, loss }) => ({ elements, mask, loss })),
  });
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) show(STEPS);
  else { await update(); play(); }
})();
