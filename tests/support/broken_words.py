"""Words that a page breaks over two lines, as a narrow screen shows them: a script for Chromium."""

#: Returns ``TAG: WORD`` for each, of the elements that a CSS selector finds; names and code may break.
BROKEN_WORDS = """(selector) => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!element.closest(selector) || element.closest('code, script, style, .away, .skip, .hidden')) continue;
    if (!element.checkVisibility()) continue;
    for (const word of node.textContent.matchAll(/[\\p{L}\\p{N}]+/gu)) {
      const range = document.createRange();
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      const lines = new Set([...range.getClientRects()].filter((one) => one.width).map((one) => Math.round(one.top)));
      if (lines.size > 1) found.push(`${element.tagName}: ${word[0]}`);
    }
  }
  return found;
}"""
