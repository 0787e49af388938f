"use strict";
(() => {
  // Plots name their colors by CSS variables, so that the style sheet alone defines the light and the dark colors.
  const source = document.getElementById("figures").textContent;
  const isTouch = matchMedia("(pointer: coarse)").matches;

  function resolveColors(value, style) {
    if (typeof value === "string") {
      return value.startsWith("var(--") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
    }
    if (Array.isArray(value)) return value.map((part) => resolveColors(part, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, resolveColors(part, style)]));
    }
    return value;
  }

  function render() {
    const style = getComputedStyle(document.documentElement);
    for (const [id, figure] of Object.entries(JSON.parse(source))) {
      const { data, layout } = resolveColors(figure, style);
      if (isTouch) layout.dragmode = false;
      const options = {
        responsive: true,
        displayModeBar: !isTouch,
        displaylogo: false,
        modeBarButtons: [["toImage", "resetScale2d"]],
        toImageButtonOptions: { format: "svg", filename: id },
      };
      Plotly.react(id, data, layout, options);
    }
  }

  render();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);

  // For printing, open all details and use the light colors.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const element of closed) element.open = true;
  });
  addEventListener("afterprint", () => {
    for (const element of closed) element.open = false;
  });
  matchMedia("print").addEventListener("change", render);

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
  // Milliseconds per frame: the animation takes at most four seconds, then the last frame stays for a while.
  const pause = Math.min(400, Math.max(60, 4000 / times.length));
  const lastPause = 1800;
  let frame = last;
  let timer = null;
  let shouldPlay = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  let isVisible = false;

  function show(index) {
    frame = index;
    // Without clearing, the previous frame would show through transparent pixels.
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(sprite, 0, -index * canvas.height);
    slider.value = index;
    slider.setAttribute("aria-valuetext", `t = ${times[index]}`);
    output.textContent = `t = ${times[index]}`;
    player.dataset.frame = index;
  }

  function step() {
    show(frame === last ? 0 : frame + 1);
    timer = setTimeout(step, frame === last ? lastPause : pause);
  }

  function update() {
    const isPlaying = shouldPlay && isVisible;
    if (isPlaying && timer === null) timer = setTimeout(step, pause);
    if (!isPlaying && timer !== null) {
      clearTimeout(timer);
      timer = null;
    }
    button.textContent = shouldPlay ? "Pause" : "Play";
  }

  button.addEventListener("click", () => {
    shouldPlay = !shouldPlay;
    if (shouldPlay) show(frame === last ? 0 : frame);
    update();
  });
  slider.addEventListener("input", () => {
    shouldPlay = false;
    update();
    show(Number(slider.value));
  });
  addEventListener("beforeprint", () => show(last));
  sprite.addEventListener("load", () => {
    show(last);
    update();
    new IntersectionObserver((entries) => {
      isVisible = entries[entries.length - 1].isIntersecting;
      update();
    }).observe(canvas);
  });
  sprite.src = player.dataset.sprite;
})();
