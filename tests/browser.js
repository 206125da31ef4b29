// What tests/browser.py asks of a page that is open: each function returns a list of what is wrong, in words.
"use strict";

window.look = (() => {
  const seen = (element) => element.checkVisibility({ visibilityProperty: true, opacityProperty: true });
  const name = (element) => {
    const text = (element.getAttribute("aria-label") || element.textContent || "").trim().replace(/\s+/g, " ");
    const id = element.id ? `#${element.id}` : "";
    const kind = element.getAttribute("class") ? `.${element.getAttribute("class").trim().replace(/\s+/g, ".")}` : "";
    return `<${element.tagName.toLowerCase()}${id}${kind}> "${text.slice(0, 60)}"`;
  };
  const USED = "a[href], button, input, select, textarea, summary, [tabindex]";
  const usable = () => [...document.querySelectorAll(USED)]
    .filter((element) => seen(element) && !element.disabled && element.tabIndex >= 0);

  // --- what is in the page ---
  function structure() {
    const found = [];
    const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
    for (const id of new Set(ids.filter((id, place) => ids.indexOf(id) !== place))) found.push(`id ${id} is there twice`);
    for (const link of document.querySelectorAll('a[href^="#"]')) {
      if (!document.getElementById(decodeURIComponent(link.hash.slice(1)))) found.push(`${name(link)} leads to nothing`);
    }
    for (const element of document.querySelectorAll("*")) {
      for (const { name: attribute } of element.attributes) {
        if (attribute === "style" || attribute.startsWith("on")) found.push(`${name(element)} has the attribute ${attribute}`);
      }
    }
    if (!document.title.trim()) found.push("the page has no title");
    if (document.querySelectorAll("h1").length !== 1) found.push("the page has not one h1");
    const levels = [...document.querySelectorAll("h1, h2, h3, h4")].map((heading) => [Number(heading.tagName[1]), heading]);
    levels.forEach(([level, heading], place) => {
      if (place && level > levels[place - 1][0] + 1) found.push(`${name(heading)} skips a level of headings`);
    });
    for (const control of document.querySelectorAll("input, select, textarea")) {
      if (!control.labels.length && !control.getAttribute("aria-label")) found.push(`${name(control)} has no label`);
    }
    for (const image of document.querySelectorAll("svg:not([aria-hidden=true])")) {
      if (!image.getAttribute("aria-label")) found.push("a drawing has no name for who cannot see it");
      for (const part of image.querySelectorAll("[fill], [stroke], [stop-color]")) {
        for (const attribute of ["fill", "stroke", "stop-color"]) {
          const value = part.getAttribute(attribute) ?? "none";
          if (!/^(var\(--[\w-]+\)|none|transparent|currentColor|url\(.*\))$/.test(value)) {
            found.push(`a drawing has the ${attribute} ${value}, which is not of the page's theme`);
          }
        }
      }
    }
    return found;
  }

  // --- nothing is wider than the page, nothing is cut, and a box that scrolls can be reached ---
  function layout() {
    const found = [];
    const width = document.documentElement.clientWidth;
    if (document.scrollingElement.scrollWidth > width) found.push(`the page is ${document.scrollingElement.scrollWidth} wide`);
    for (const element of document.body.querySelectorAll("*")) {
      if (!seen(element)) continue;
      const box = element.getBoundingClientRect();
      if (!box.width || element.closest(".skip")) continue;
      const around = element.parentElement;
      const holder = around.closest(".scroll");
      const held = holder && getComputedStyle(holder).overflowX !== "visible";
      const wide = ({ left, right }) => right > width + 1 || left < -1;
      if (!held && !element.ownerSVGElement && wide(box) && (around === document.body || !wide(around.getBoundingClientRect()))) {
        found.push(`${name(element)} reaches from ${Math.round(box.left)} to ${Math.round(box.right)}`);
      }
      const style = getComputedStyle(element);
      const scrolls = (side) => ["auto", "scroll"].includes(style[`overflow${side}`]);
      if ((scrolls("X") && element.scrollWidth > element.clientWidth + 1
        || scrolls("Y") && element.scrollHeight > element.clientHeight + 1)
        && element.tabIndex < 0 && !["SELECT", "TEXTAREA"].includes(element.tagName)) {
        found.push(`${name(element)} scrolls and has no tabindex`);
      }
    }
    for (const image of document.querySelectorAll("svg")) found.push(...drawing(image));
    return found;
  }

  function drawing(image) {
    if (!seen(image)) return [];
    const found = [];
    const own = image.getBoundingClientRect();
    // Drawn with the letters of another machine, a text may be a little longer. It may then use the margin of the page.
    const clipped = getComputedStyle(image).overflow !== "visible";
    const frame = { top: own.top, bottom: own.bottom, left: clipped ? own.left : 0, right: clipped ? own.right : document.documentElement.clientWidth };
    const texts = [...image.querySelectorAll("text")].filter((text) => text.textContent.trim() && seen(text));
    const boxes = texts.map((text) => text.getBoundingClientRect());
    boxes.forEach((box, place) => {
      const text = texts[place];
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1) {
        const side = ["left", "top"].find((name) => box[name] < frame[name] - 1) ?? ["right", "bottom"].find((name) => box[name] > frame[name] + 1);
        found.push(`"${text.textContent}" is cut off at the ${side} of the drawing "${image.getAttribute("aria-label")}"`);
      }
      for (let other = 0; other < place; other += 1) {
        const next = boxes[other];
        const across = Math.min(box.right, next.right) - Math.max(box.left, next.left);
        const down = Math.min(box.bottom, next.bottom) - Math.max(box.top, next.top);
        const smaller = Math.min(box.width * box.height, next.width * next.height);
        if (across > 0 && down > 0 && across * down > 0.25 * smaller) {
          found.push(`"${text.textContent}" lies over "${texts[other].textContent}" in the drawing "${image.getAttribute("aria-label")}"`);
        }
      }
    });
    return found;
  }

  // --- contrast: of each text to what is drawn behind it, both as computed ---
  const colour = (text) => {
    const numbers = text.match(/^rgba?\(([^)]*)\)$/)?.[1].split(/[ ,/]+/).map(Number);
    if (!numbers) throw new Error(`not a colour that can be read: ${text}`);
    return numbers.length === 3 ? [...numbers, 1] : numbers;
  };
  const over = ([r, g, b, a], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a), 1];
  const luminance = ([...rgb]) => rgb.slice(0, 3)
    .map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
  const ratio = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const PAPER = [255, 255, 255, 1];
  const onPaper = () => matchMedia("print").matches; // a printer leaves backgrounds out
  const backgrounds = new Map();
  function behind(element) {
    if (!element || onPaper()) return PAPER;
    if (!backgrounds.has(element)) {
      backgrounds.set(element, over(colour(getComputedStyle(element).backgroundColor), behind(element.parentElement)));
    }
    return backgrounds.get(element);
  }
  const opacity = (element) => (element ? Number(getComputedStyle(element).opacity) * opacity(element.parentElement) : 1);

  // Of a drawing: the shapes before the text in whose inside its middle lies.
  function behindDrawn(text) {
    const box = text.getBoundingClientRect();
    let back = behind(text.ownerSVGElement.parentElement);
    for (const shape of text.ownerSVGElement.querySelectorAll("path, rect, circle")) {
      if (!(shape.compareDocumentPosition(text) & Node.DOCUMENT_POSITION_FOLLOWING)) continue;
      const style = getComputedStyle(shape);
      if (style.fill === "none" || !seen(shape) || shape.closest("defs, clipPath")) continue;
      const middle = new DOMPoint((box.left + box.right) / 2, (box.top + box.bottom) / 2).matrixTransform(shape.getScreenCTM().inverse());
      if (!shape.isPointInFill(middle)) continue;
      const [r, g, b, a] = colour(style.fill);
      back = over([r, g, b, a * Number(style.fillOpacity) * opacity(shape)], back);
    }
    return back;
  }

  function contrasts(least) {
    backgrounds.clear();
    const found = new Map();
    const check = (element, text, front, back) => {
      const [r, g, b, a] = front;
      const is = ratio(over([r, g, b, a * opacity(element)], back), back);
      const key = `${element.tagName} ${element.getAttribute("class")} ${front} ${back}`;
      if (is < least && !found.has(key)) found.set(key, `the contrast of "${text.trim().slice(0, 60)}" is ${is.toFixed(2)}`);
    };
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node = walk.nextNode(); node; node = walk.nextNode()) {
      const element = node.parentElement;
      if (!node.data.trim() || !seen(element) || element.closest("option, script, style, title")) continue;
      const style = getComputedStyle(element);
      if (element.ownerSVGElement) {
        const front = colour(style.fill);
        check(element, node.data, [front[0], front[1], front[2], front[3] * Number(style.fillOpacity)], behindDrawn(element.closest("text")));
      } else check(element, node.data, colour(style.color), behind(element));
    }
    for (const control of document.querySelectorAll("input, select")) {
      if (!seen(control)) continue;
      check(control, `what is typed into ${name(control)}`, colour(getComputedStyle(control).color), behind(control));
      if (control.placeholder) check(control, control.placeholder, colour(getComputedStyle(control, "::placeholder").color), behind(control));
    }
    return [...found.values()];
  }

  function darkness() {
    return luminance(over(colour(getComputedStyle(document.body).backgroundColor), PAPER)) < 0.5;
  }

  // --- tables: each heading sorts, both ways; what is not there comes last ---
  function tables() {
    const found = [];
    for (const table of document.querySelectorAll("table.sortable")) {
      const headings = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
      const body = table.tBodies[0];
      const count = body.rows.length;
      headings.forEach((heading, column) => {
        const title = `column "${heading.textContent.trim()}"`;
        const button = heading.querySelector("button");
        if (!button) return found.push(`${title} has no button`);
        const values = () => [...body.rows].map((row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim());
        const numeric = values().every((value) => value === "" || Number.isFinite(Number(value)));
        if (heading.classList.contains("number") && !numeric) found.push(`${title} has numbers that do not sort as numbers: ${values().find((value) => !Number.isFinite(Number(value)))}`);
        const before = (a, b) => (numeric ? Number(a) <= Number(b) : a.localeCompare(b) <= 0);
        const directions = new Set();
        for (let click = 0; click < 2; click += 1) {
          button.click();
          const direction = heading.getAttribute("aria-sort");
          directions.add(direction);
          if (table.querySelectorAll("[aria-sort]").length !== 1) found.push(`more than ${title} says that it is sorted`);
          const order = values();
          const there = order.filter((value) => value !== "");
          if (order.length !== count || order.slice(0, there.length).includes("")) found.push(`${title}: what is not there is not last`);
          const sorted = there.every((value, place) => !place
            || (direction === "ascending" ? before(there[place - 1], value) : before(value, there[place - 1])));
          if (!sorted) found.push(`${title} is not ${direction}: ${there.slice(0, 8)}`);
        }
        if (directions.size !== 2 || !directions.has("ascending")) found.push(`${title} sorts one way only`);
      });
    }
    return found;
  }

  // --- filters: each choice shows what matches, and only that ---
  function filters() {
    const found = [];
    for (const group of document.querySelectorAll(".filters")) {
      const entries = [...document.querySelectorAll(`${group.dataset.filters} [data-entry]`)];
      if (!entries.length) found.push(`${name(group)} filters nothing`);
      const shown = () => entries.filter((entry) => seen(entry));
      const choose = (control, value) => { control.value = value; control.dispatchEvent(new Event("input", { bubbles: true })); };
      const expect = (what, wanted) => {
        const now = shown();
        if (now.length !== wanted.length || now.some((entry) => !wanted.includes(entry))) found.push(`${what}: ${now.length} are shown, not ${wanted.length}`);
        const told = group.querySelector("output");
        if (told && told.textContent.trim() !== `${wanted.length} of ${entries.length} shown`) found.push(`${what}: it says "${told.textContent}"`);
      };
      expect("no filter", entries);
      for (const control of group.querySelectorAll("select")) {
        const start = control.value;
        let any = 0;
        for (const { value } of [...control.options].filter((option) => option.value)) {
          const wanted = entries.filter((entry) => (entry.dataset[control.name] ?? "").toLowerCase().split(" ").includes(value.toLowerCase()));
          choose(control, value);
          expect(`${control.name} = ${value}`, wanted);
          any += wanted.length;
        }
        if (!any) found.push(`the filter ${control.name} never shows anything`);
        choose(control, start);
      }
      for (const control of group.querySelectorAll("input")) {
        if (control.type !== "search") { found.push(`${name(control)} is not a search`); continue; }
        choose(control, "there is no such text on this page");
        expect("a search for what is not there", []);
        const word = entries[0]?.textContent.match(/\p{L}{3,}/u)?.[0] ?? "";
        choose(control, word.toUpperCase());
        expect(`a search for ${word}`, entries.filter((entry) => entry.textContent.toLowerCase().includes(word.toLowerCase())));
        choose(control, "");
      }
      expect("the filter is off again", entries);
    }
    return found;
  }

  return {
    structure, layout, contrasts, darkness, tables, filters,
    leave() { document.activeElement?.blur(); window.getSelection().removeAllRanges(); this.order = usable(); },
    number() { return this.order.length; },
    names() { return this.order.map(name); },
    active() { return this.order.indexOf(document.activeElement); },
  };
})();
