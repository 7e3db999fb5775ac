"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const config = { displayModeBar: false, responsive: true, scrollZoom: false, showTips: false, doubleClick: false };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 30rem)");
  const buttons = [...document.querySelectorAll("[data-row]")];
  const key = ({ dataset }) => `${dataset.study} ${dataset.row}`;
  const first = new Set(buttons.filter((button) => button.getAttribute("aria-pressed") === "true").map(key));
  const hidden = new Set(buttons.map(key).filter((name) => !first.has(name))); // methods not shown in curves
  const printed = { wide: 625, side: 290 }; // widths of plots on paper, in CSS pixels: two stand side by side
  let printing = false;
  let view = webgl() ? "surface" : "map";
  let camera = null;

  function webgl() {
    const canvas = document.createElement("canvas");
    const context = canvas.getContext("webgl");
    if (context) context.getExtension("WEBGL_lose_context")?.loseContext();
    return Boolean(context);
  }

  // Colours after "@" are the page's own, light or dark; they stand only under keys that end in "color".
  function colour(word, theme) {
    const [name, opacity] = word.slice(1).split("/");
    const value = theme.getPropertyValue(`--${name}`).trim();
    if (!opacity) return value;
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(value.slice(at, at + 2), 16));
    return `rgba(${r},${g},${b},${opacity})`;
  }
  function themed(value, theme, under = "") {
    if (Array.isArray(value)) return value.map((item) => themed(item, theme, under));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, themed(item, theme, name)]));
    }
    return typeof value === "string" && value.startsWith("@") && under.endsWith("color") ? colour(value, theme) : value;
  }

  const isCurves = (plot) => "curves" in plot.dataset;
  const isLandscape = (plot) => "landscape" in plot.dataset;
  const nameOf = (plot) => plot.dataset.figure + (isLandscape(plot) ? `-${printing ? "map" : view}` : "");
  const studyOf = (plot) => plot.dataset.figure.split("-")[0];
  const isSurface = (plot) => isLandscape(plot) && view === "surface" && !printing;

  function made(plot) {
    const figure = themed(figures[nameOf(plot)], getComputedStyle(document.documentElement));
    for (const trace of figure.data) {
      if (isCurves(plot) && hidden.has(`${studyOf(plot)} ${trace.meta?.row}`)) trace.visible = false;
    }
    if (isSurface(plot) && camera) figure.layout.scene.camera = camera;
    const title = figure.layout.xaxis?.title;
    if (title && narrow.matches && !printing) title.text = title.text.replace(/(.{18,}?) /g, "$1<br>"); // or it is cut off
    if (printing) {
      figure.layout.autosize = false;
      figure.layout.width = plot.closest(".wide") && !isLandscape(plot) ? printed.wide : printed.side;
      if (!isLandscape(plot)) figure.layout.height = Math.min(figure.layout.height, 300);
    }
    return figure;
  }

  function draw(plot) {
    const figure = made(plot);
    const fresh = plot.dataset.drawn !== nameOf(plot);
    if (fresh && plot.dataset.drawn) Plotly.purge(plot);
    plot.dataset.drawn = nameOf(plot);
    Plotly[fresh ? "newPlot" : "react"](plot, figure.data, figure.layout, { ...config, responsive: !printing });
    if (fresh && isSurface(plot)) {
      plot.on("plotly_relayouting", (change) => turned(plot, change));
      plot.on("plotly_relayout", (change) => turned(plot, change));
    }
  }

  // Surfaces are turned together.
  let linking = false;
  function turned(source, change) {
    if (!change["scene.camera"] || linking) return;
    camera = change["scene.camera"];
    link(source);
  }
  function link(source) {
    linking = true;
    requestAnimationFrame(() => {
      const others = plots.filter((plot) => plot !== source && isSurface(plot) && plot.dataset.drawn);
      Promise.all(others.map((plot) => Plotly.relayout(plot, { "scene.camera": camera }))).finally(() => (linking = false));
    });
  }
  function turn(how) {
    const first = plots.find((plot) => isSurface(plot));
    if (!first) return;
    const start = figures[nameOf(first)].layout.scene.camera;
    const { eye } = camera ?? start;
    const around = { left: -15, right: 15 }[how] ?? 0;
    const above = { up: 10, down: -10 }[how] ?? 0;
    const far = Math.hypot(eye.x, eye.y, eye.z);
    const angle = Math.atan2(eye.y, eye.x) + (around * Math.PI) / 180;
    const tilt = Math.min(1.5, Math.max(-0.2, Math.asin(eye.z / far) + (above * Math.PI) / 180));
    const flat = far * Math.cos(tilt);
    const moved = { x: flat * Math.cos(angle), y: flat * Math.sin(angle), z: far * Math.sin(tilt) };
    camera = how === "back" ? structuredClone(start) : { ...start, eye: moved };
    link(null);
  }

  // Drawn when they come near the window; surfaces that have gone are taken down, since browsers keep few of them.
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        if (isIntersecting && !target.dataset.drawn) draw(target);
        else if (!isIntersecting && target.dataset.drawn && isSurface(target)) {
          Plotly.purge(target);
          delete target.dataset.drawn;
        }
      }
    },
    { rootMargin: "300px" },
  );
  plots.forEach((plot) => watcher.observe(plot));
  const redraw = (which = () => true) => plots.filter((plot) => plot.dataset.drawn && which(plot)).forEach(draw);

  function choose(which, wanted) {
    for (const button of which) {
      const on = wanted(button);
      if (on) hidden.delete(key(button));
      else hidden.add(key(button));
      button.setAttribute("aria-pressed", String(on));
    }
    redraw((plot) => isCurves(plot) && studyOf(plot) === which[0].dataset.study);
  }

  function show(word) {
    view = word;
    for (const button of document.querySelectorAll("[data-view]")) {
      button.setAttribute("aria-pressed", String(button.dataset.view === word));
    }
    for (const group of document.querySelectorAll(".turning")) group.hidden = word !== "surface";
  }
  show(view);

  document.addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (!button) return;
    const { row, study, view: wanted, turn: how, save, show: which } = button.dataset;
    if (row !== undefined) {
      choose([button], (each) => hidden.has(key(each)));
    } else if (which) {
      const mine = buttons.filter((each) => each.dataset.study === study);
      choose(mine, (each) => which === "all" || first.has(key(each)));
    } else if (wanted) {
      show(wanted === "surface" && !webgl() ? "map" : wanted);
      redraw(isLandscape);
    } else if (how) turn(how);
    else if (save) {
      const { data, layout } = made(plots.find((plot) => plot.dataset.figure === save));
      const paper = getComputedStyle(document.documentElement).getPropertyValue("--paper").trim();
      const whole = { ...layout, showlegend: true, paper_bgcolor: paper };
      Plotly.downloadImage({ data, layout: whole }, { format: "svg", width: 800, height: 500, filename: save });
    }
  });

  for (const query of [dark, narrow]) query.addEventListener("change", () => redraw());
  addEventListener("beforeprint", () => {
    printing = true;
    plots.forEach(draw);
  });
  addEventListener("afterprint", () => {
    printing = false;
    redraw();
    plots.filter((plot) => isSurface(plot) && plot.dataset.drawn).forEach((plot) => {
      Plotly.purge(plot);
      delete plot.dataset.drawn;
      watcher.unobserve(plot);
      watcher.observe(plot);
    });
  });
})();
