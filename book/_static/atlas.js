// The design-space page: a table of the rows that match the search box, the axes and the check box, a page at a
// time, and under the row that is chosen all that the atlas knows of it. Nothing is made before it is asked for.
document.addEventListener("DOMContentLoaded", () => {
  const PAGE = 50;
  for (const atlas of document.querySelectorAll(".ttr-atlas")) {
    const data = JSON.parse(atlas.querySelector("[data-atlas]").textContent);
    const axes = Object.keys(data.choices);
    const body = atlas.querySelector("tbody");
    const search = atlas.querySelector("[data-search]");
    const selects = [...atlas.querySelectorAll("[data-axis]")];
    const unnamed = atlas.querySelector("[data-unnamed]");
    const count = atlas.querySelector("[data-count]");
    const more = atlas.querySelector("[data-more]");
    const DEFAULTS = ["Uniform()", "Linear()", "Hebbian()", "SquaredError()", "L2()"];

    for (const row of data.rows) {
      row.choices = row.choices.map((number, axis) => data.choices[axes[axis]][number]);
      row.line ??= `ttr.Design(${axes
        .map((axis, i) => [axis, row.choices[i], DEFAULTS[i]])
        .filter(([, choice, usual]) => choice !== usual)
        .map(([axis, choice]) => `${axis}=${choice.replace(/\b([A-Z][A-Za-z0-9]*\()/g, "ttr.$1")}`)
        .join(", ")})`;
      const keys = row.cites.map((number) => data.references[number][0]);
      row.words = [row.name, row.slug, ...row.choices, data.inputs[row.inputs], ...keys].join(" ").toLowerCase();
    }

    const element = (tag, attributes = {}, ...children) => {
      const made = Object.assign(document.createElement(tag), attributes);
      made.append(...children);
      return made;
    };

    // A choice as text that a narrow column may break.
    const breakable = (choice) =>
      choice
        .replaceAll("()", "")
        .split(/(?<=[(=])/)
        .flatMap((part, i) => (i ? [element("wbr"), part] : [part]));

    const link = (href, text) => element("a", { href }, text);

    const copyable = (text, what) => {
      const button = element("button", { type: "button", className: "ttr-atlas-copy" }, `copy ${what}`);
      const said = element("span", { className: "ttr-atlas-said" });
      said.setAttribute("role", "status");
      const code = element("code", {}, text);
      const pre = element("pre", { tabIndex: 0 }, code);
      pre.setAttribute("role", "region");
      pre.setAttribute("aria-label", what);
      button.addEventListener("click", async () => {
        try {
          await navigator.clipboard.writeText(text);
          said.textContent = "copied";
        } catch {
          getSelection().selectAllChildren(code); // no right to the clipboard: select it for the reader's own keys
          said.textContent = "selected";
        }
      });
      return element("div", { className: "ttr-atlas-code" }, pre, button, said);
    };

    const term = (name, ...description) => [element("dt", {}, name), element("dd", {}, ...description)];

    const detail = (row) => {
      const made = element("dl");
      if (row.slug) {
        const [page, title] = data.chapters[row.slug];
        made.append(...term("chapter", link(page, title)));
      } else {
        const near = row.near.flatMap(([slug, ...differing], i) => {
          const shown = data.rows.find((other) => other.slug === slug).name;
          const how = ` (another ${differing.map((axis) => axes[axis]).join(" and ")})`;
          return [i ? ", " : "", link(`#${slug}`, shown), how];
        });
        made.append(
          ...term(
            "chapter",
            "Nobody has published this, as far as the atlas knows. ",
            link("14_make_your_own.html", "Make it your own"),
            ".",
          ),
          ...term("nearest", ...near),
        );
      }
      const rule = element(
        "div",
        { className: "math notranslate nohighlight" },
        `\\[\\begin{aligned}${row.rule.map((number) => data.rules[number]).join(" \\\\ ")}\\end{aligned}\\]`,
      );
      const chosen = axes.map((axis, i) => `${axis} ${row.choices[i].replaceAll("()", "")}`).join(", ");
      made.append(
        ...term("update rule", rule),
        ...term("choices", chosen),
        ...term("inputs", data.inputs[row.inputs]),
        ...term("cost of a head", data.costs[row.cost]),
      );
      if (row.limits) {
        const ends = row.limits.map((limit) => element("li", {}, limit));
        made.append(...term("limits", element("ul", {}, ...ends)));
      }
      made.append(...term("code", copyable(row.line, "code")));
      const entries = row.cites.map((number) => data.references[number][1]).join("\n\n");
      made.append(...term("citation", copyable(entries, "BibTeX")));
      return [made, rule];
    };

    const toggle = (row, line, button) => {
      const open = button.getAttribute("aria-expanded") !== "true";
      button.setAttribute("aria-expanded", String(open));
      if (!open) {
        line.nextElementSibling.remove();
        return;
      }
      const [made, rule] = detail(row);
      const cell = element("td", { colSpan: axes.length + 1 }, made);
      line.after(element("tr", { className: "ttr-atlas-detail" }, cell));
      if (window.MathJax) MathJax.startup.promise.then(() => MathJax.typesetPromise([rule]));
    };

    const lineOf = (row) => {
      const button = element("button", { type: "button", className: "ttr-atlas-name" }, row.name ?? "no name");
      button.setAttribute("aria-expanded", "false");
      const brief = axes.map((axis, i) => (row.choices[i] === DEFAULTS[i] ? "" : row.choices[i].replaceAll("()", "")));
      const head = element("th", { scope: "row" }, button);
      head.append(element("span", { className: "ttr-atlas-brief" }, brief.filter(Boolean).join(" · ") || "all usual"));
      const cells = row.choices.map((choice) => element("td", {}, ...breakable(choice)));
      const line = element("tr", { className: "ttr-atlas-row" }, head, ...cells);
      if (row.line.startsWith("ttr.atlas")) line.id = row.slug;
      line.addEventListener("click", (event) => {
        if (event.target === button || !getSelection().toString()) toggle(row, line, button);
      });
      line.addEventListener("keydown", (event) => {
        const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
        if (!step || event.target !== button) return;
        const buttons = [...body.querySelectorAll(".ttr-atlas-name")];
        buttons[buttons.indexOf(button) + step]?.focus();
        event.preventDefault();
      });
      return line;
    };

    let matching = [];
    let shown = 0;
    const grow = () => {
      const next = matching.slice(shown, shown + PAGE);
      body.append(...next.map(lineOf));
      shown += next.length;
      more.hidden = shown === matching.length;
      const part = more.hidden ? "" : `, the first ${shown} shown`;
      count.textContent = `${matching.length} of ${data.rows.length} memories${part}`;
    };

    const filter = () => {
      const words = search.value.toLowerCase().split(/\s+/);
      const wanted = selects.map((select) => select.value);
      matching = data.rows.filter(
        (row) =>
          (unnamed.checked || row.slug) &&
          wanted.every((choice, axis) => !choice || row.choices[axis] === choice) &&
          words.every((word) => row.words.includes(word)),
      );
      body.replaceChildren();
      shown = 0;
      grow();
    };

    // #kda opens that row: other pages link to it, and so does a cell without a name to those near it.
    const follow = () => {
      const slug = decodeURIComponent(location.hash.slice(1));
      if (!data.chapters[slug]) return;
      if (!document.getElementById(slug)) {
        search.value = "";
        for (const select of selects) select.value = "";
        filter();
      }
      const line = document.getElementById(slug);
      const button = line.querySelector("button");
      if (button.getAttribute("aria-expanded") !== "true") button.click();
      line.scrollIntoView({ block: "nearest" });
      button.focus({ preventScroll: true });
    };

    more.addEventListener("click", () => {
      const first = shown;
      grow();
      body.querySelectorAll(".ttr-atlas-name")[first]?.focus();
    });
    search.addEventListener("input", filter);
    for (const choice of [...selects, unnamed]) choice.addEventListener("change", filter);
    window.addEventListener("hashchange", follow);
    filter();
    follow();
  }
});
