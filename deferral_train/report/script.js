"use strict";
// Text always enters through textContent; nothing in the data is ever parsed as HTML.
(function () {
  const byId = (id) => document.getElementById(id);
  const data = (id) => { const node = byId(id); return node ? JSON.parse(node.textContent) : null; };
  const make = (tag, text, css) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (css) node.className = css;
    return node;
  };
  const options = (select, names, chosen) => {
    for (const [value, text] of names) {
      const option = make("option", text);
      option.value = value;
      select.append(option);
    }
    select.value = chosen;
  };
  const shown = (text) => text.replace(/\n/g, "↵\n");
  const number = (value, digits) => value === undefined ? "–" : value.toFixed(digits === undefined ? 3 : digits);

  // Legends: show and hide a rule in all charts of a section.
  for (const legend of document.querySelectorAll("[data-legend]")) {
    legend.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      for (const chart of document.querySelectorAll(`[data-charts="${legend.dataset.legend}"]`)) {
        for (const series of chart.querySelectorAll("[data-series]")) {
          if (series.dataset.series === button.dataset.name) series.classList.toggle("hidden", !on);
        }
      }
    });
  }

  function tokenView(view) {
    const promptChoice = byId("token-prompt"), ruleChoice = byId("token-rule"), box = byId("token-text");
    let selected = -1;
    options(promptChoice, view.prompts.map((p, i) => [i, p.id]), 0);
    options(ruleChoice, view.rules.map((rule) => [rule, rule]), view.first);

    function render() {
      const prompt = view.prompts[promptChoice.value], tokens = prompt.texts[ruleChoice.value] || [];
      byId("token-title").textContent = ruleChoice.value;
      byId("token-reference").textContent = prompt.reference || "none";
      const beside = view.beside ? prompt.texts[view.beside] || [] : [];
      byId("token-beside-title").textContent = view.beside ? `The verifier's own text (${view.beside})` : "";
      box.replaceChildren(...tokens.map((token, place) => {
        const node = make("span", shown(token.t), "token " + view.origins[token.o]);
        node.setAttribute("role", "option");
        node.setAttribute("aria-selected", "false");
        node.id = "token-" + place;
        if (beside.length && (!beside[place] || beside[place].t !== token.t)) node.classList.add("differs");
        return node;
      }));
      byId("token-beside").replaceChildren(...beside.map((token) => make("span", shown(token.t), "verifier")));
      selected = -1;
      byId("token-detail").textContent = "Choose a token.";
    }

    function candidates(title, list) {
      const table = make("table"), head = make("tr");
      head.append(make("th", title), make("th", "%"));
      table.append(head);
      for (const [text, share] of list || []) {
        const row = make("tr");
        row.append(make("td", JSON.stringify(text)), make("td", share.toFixed(1)));
        table.append(row);
      }
      return table;
    }

    function select(place) {
      const tokens = view.prompts[promptChoice.value].texts[ruleChoice.value] || [];
      if (place < 0 || place >= tokens.length) return;
      if (box.children[selected]) box.children[selected].setAttribute("aria-selected", "false");
      selected = place;
      box.children[place].setAttribute("aria-selected", "true");
      box.setAttribute("aria-activedescendant", "token-" + place);
      const token = tokens[place], detail = byId("token-detail");
      const decision = token.d === undefined ? "no draft here" : token.d ? "deferred to the verifier" : "kept";
      const line = make("p", `${JSON.stringify(token.t)}: ${view.origins[token.o]}; decision: ${decision}` +
        (token.x !== undefined ? `; drafted ${JSON.stringify(token.x)}` : ""));
      const values = make("p", `estimated loss gap ${number(token.g)}, D_TV ${number(token.v)}`);
      const tables = make("div", undefined, "texts");
      if (token.q) tables.append(candidates("drafter's top", token.q));
      if (token.p) tables.append(candidates("verifier's top", token.p));
      if (!token.p) tables.append(make("p", "Candidates were not logged; decode with --log-tokens 5.", "soft"));
      detail.replaceChildren(line, values, tables);
    }

    const placeOf = (event) => Array.prototype.indexOf.call(box.children, event.target.closest(".token"));
    box.addEventListener("mouseover", (event) => select(placeOf(event)));
    box.addEventListener("pointerdown", (event) => select(placeOf(event)));
    box.addEventListener("keydown", (event) => {
      const last = box.children.length - 1;
      const to = { ArrowRight: selected + 1, ArrowLeft: selected - 1, Home: 0, End: last }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      select(Math.max(0, Math.min(last, to)));
    });
    promptChoice.addEventListener("change", render);
    ruleChoice.addEventListener("change", render);
    render();
    select(0);
  }

  function slider(view) {
    const input = byId("alpha"), promptChoice = byId("slider-prompt"), estimator = byId("slider-estimator");
    options(promptChoice, view.prompts.map((p, i) => [i, p.id]), 0);
    options(estimator, view.estimators.map((name) => [name, name]), view.estimators[0]);
    input.min = view.alpha.low;
    input.max = view.alpha.high;
    input.value = view.alpha.start;
    let spans = [];

    function text() {
      spans = view.prompts[promptChoice.value].tokens.map((piece) => make("span", shown(piece), "token"));
      byId("slider-text").replaceChildren(...spans);
      update();
    }

    // Over all logged prompts: risk = mean(l(y,q) - r gap), rejection = mean(r D_TV), deferral = mean(r).
    function update() {
      const alpha = Number(input.value), name = estimator.value;
      let rows = 0, risk = 0, rejection = 0, deferral = 0;
      view.prompts.forEach((prompt, number) => {
        prompt.gap[name].forEach((gap, place) => {
          const defer = gap > alpha * prompt.tv[place];
          rows += 1;
          risk += prompt.drafter_loss[place] - (defer ? prompt.observed_gap[place] : 0);
          rejection += defer ? prompt.tv[place] : 0;
          deferral += defer ? 1 : 0;
          if (number === Number(promptChoice.value)) spans[place].className = "token " + (defer ? "accepted" : "kept");
        });
      });
      byId("alpha-value").textContent = alpha.toFixed(3);
      byId("slider-risk").textContent = (risk / rows).toFixed(4);
      byId("slider-rejection").textContent = (rejection / rows).toFixed(4);
      byId("slider-deferral").textContent = (deferral / rows).toFixed(4);
      byId("slider-scope").textContent = `over ${rows} logged positions of ${view.prompts.length} prompts`;
    }

    input.addEventListener("input", update);
    estimator.addEventListener("change", update);
    promptChoice.addEventListener("change", text);
    text();
  }

  const tokens = data("token-data"), prefixes = data("slider-data");
  if (tokens) tokenView(tokens);
  if (prefixes) slider(prefixes);
})();
