"use strict";
(() => {
  // Plots name their colors as variables of the style sheet: one place decides how the page looks, dark or light.
  const source = document.getElementById("figures").textContent;
  const coarse = matchMedia("(pointer: coarse)").matches;

  function colored(value, style) {
    if (typeof value === "string") {
      return value.startsWith("var(--") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
    }
    if (Array.isArray(value)) return value.map((part) => colored(part, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, colored(part, style)]));
    }
    return value;
  }

  function draw() {
    const style = getComputedStyle(document.documentElement);
    for (const [id, figure] of Object.entries(JSON.parse(source))) {
      const { data, layout } = colored(figure, style);
      if (coarse) layout.dragmode = false;
      const options = {
        responsive: true,
        displayModeBar: !coarse,
        displaylogo: false,
        modeBarButtons: [["toImage", "resetScale2d"]],
        toImageButtonOptions: { format: "svg", filename: id },
      };
      Plotly.react(id, data, layout, options);
    }
  }

  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  // On paper everything is open, and colors are those of the light page.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const element of closed) element.open = true;
  });
  addEventListener("afterprint", () => {
    for (const element of closed) element.open = false;
  });
  matchMedia("print").addEventListener("change", draw);

  const player = document.getElementById("player");
  if (!player) return;
  const canvas = player.querySelector("canvas");
  const button = player.querySelector("button");
  const slider = player.querySelector("input");
  const output = player.querySelector("output");
  const times = JSON.parse(player.dataset.times);
  const sprite = new Image();
  const context = canvas.getContext("2d");
  const last = times.length - 1;
  // The last frame stays for a while, and the whole takes about four seconds.
  const pause = Math.min(400, Math.max(60, 4000 / times.length));
  const hold = 1800;
  let frame = last;
  let timer = null;
  let wanted = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  let visible = false;

  function show(index) {
    frame = index;
    // What is transparent would show the frame before.
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(sprite, 0, -index * canvas.height);
    slider.value = index;
    slider.setAttribute("aria-valuetext", `t = ${times[index]}`);
    output.textContent = `t = ${times[index]}`;
    player.dataset.frame = index;
  }

  function step() {
    show(frame === last ? 0 : frame + 1);
    timer = setTimeout(step, frame === last ? hold : pause);
  }

  function update() {
    const runs = wanted && visible;
    if (runs && timer === null) timer = setTimeout(step, pause);
    if (!runs && timer !== null) {
      clearTimeout(timer);
      timer = null;
    }
    button.textContent = wanted ? "Pause" : "Play";
  }

  button.addEventListener("click", () => {
    wanted = !wanted;
    if (wanted) show(frame === last ? 0 : frame);
    update();
  });
  slider.addEventListener("input", () => {
    wanted = false;
    update();
    show(Number(slider.value));
  });
  addEventListener("beforeprint", () => show(last));
  sprite.addEventListener("load", () => {
    show(last);
    update();
    new IntersectionObserver((entries) => {
      visible = entries[entries.length - 1].isIntersecting;
      update();
    }).observe(canvas);
  });
  sprite.src = player.dataset.sprite;
})();
