// Lays an API workflow out on ComfyUI's real page and returns both of its forms as JSON text.
// Runs inside the page; scripts/page_workflows.py describes the layout.
async ({ prompt, layout, outputNodes, name, id, pack, engineVersion }) => {
  const gap = 30, titleHeight = 30, groupTitle = 50, minimumWidth = 300, outputHeight = 340, noteLine = 22;
  const widgetPadding = 90, maximumWidth = 540;
  const roundUp = (value) => Math.ceil(value / 10) * 10;
  const isOurs = (node) => node.type.startsWith("IdentityEdit");

  // A text that nodes show once they have run makes them higher.
  const textHeight = 70;
  const withText = [
    "AlignReference", "ApplyStyleCrossAttention", "ApplySubject", "AugmentImages", "AverageWPlus", "DiffEdit",
    "EncodeWPlus", "IdentityAwareMaskBlend", "ImagicFineTuning", "LoadIdentityPrior", "LoadIdentityWords",
    "LoadStyleAttention", "LoadSubjectImages", "LoadWPlus", "LoadWPlusEncoder", "MCDMConditioner", "MCDMEditMask",
    "MCDMGuider", "MixWPlus", "NullTextOptimization", "OptimizeTextEmbedding", "ReferenceGuidedNullTextOptimizer",
    "RegisterEdit", "RegularizationPrompts", "ReplaceSubject", "SegmentSubjectWithSAM", "SelectReference",
    "StepWiseEmbeddingLoader", "SubjectFromImages", "TimestepAwareTextInjectionSampler",
  ].map((name) => `IdentityEdit${name}`);

  // The page cuts a widget's label when label and value do not fit side by side into the node.
  const ruler = document.createElement("canvas").getContext("2d");
  ruler.font = app.canvas.inner_text_font;
  const widgetWidth = (widget) => {
    if (widget.element || widget.hidden) return 0;
    const texts = [widget.label ?? widget.name, String(widget.value)];
    const width = texts.reduce((sum, text) => sum + ruler.measureText(text).width, widgetPadding);
    return Math.min(width, maximumWidth);
  };

  await app.loadApiJson(prompt, name);
  const graph = app.graph;
  graph.id = id;

  for (const node of graph.nodes) {
    // From which pack and version a node is: ComfyUI-Manager offers to install what a user lacks.
    node.properties.cnr_id = isOurs(node) ? pack.id : "comfy-core";
    node.properties.ver = isOurs(node) ? pack.version : engineVersion;
    for (const widget of node.widgets ?? []) {
      // The same image every time, until the user asks for another.
      if (widget.name === "control_after_generate") widget.value = "fixed";
    }
    const height = outputNodes.includes(node.type) ? Math.max(node.size[1], outputHeight) : node.size[1];
    const width = Math.max(node.size[0], minimumWidth, ...(node.widgets ?? []).map(widgetWidth));
    node.setSize([roundUp(width), roundUp(height)]);
  }
  for (const [key, size] of Object.entries(layout.sizes ?? {})) graph.getNodeById(key).setSize(size);

  // The page's newer way to draw nodes, "Nodes 2.0", makes them higher: a line with the pack's name, larger widgets and
  // texts. Both ways leave a gap below this.
  const heightOf = (node) => {
    const shown = (node.widgets ?? []).filter((widget) => !widget.hidden);
    const texts = shown.filter((widget) => widget.element).length;
    const further = node.subgraph ? 70 : node.type === "LoadImage" ? 340 : withText.includes(node.type) ? textHeight : 0;
    return node.size[1] + further + roundUp((isOurs(node) ? 28 : 4) + 3 * shown.length + 20 * texts);
  };

  const addNote = (text, width) => {
    const note = LiteGraph.createNode("MarkdownNote");
    note.title = "Note";
    graph.add(note);
    note.widgets[0].value = text;
    const lines = text.trim().split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil((line.length * 8) / width)), 0);
    note.setSize([width, roundUp(lines * noteLine + 60)]);
    return note;
  };

  // Columns stand side by side, each from top to bottom. An entry is a node's id or a folded part's node.
  const place = (columns, left, top) => {
    let right = left, bottom = top;
    for (const column of columns) {
      let y = top, width = 0;
      for (const entry of column) {
        const node = folded.get(entry) ?? graph.getNodeById(entry);
        node.pos = [right, y + titleHeight];
        y += titleHeight + heightOf(node) + gap;
        width = Math.max(width, node.size[0]);
      }
      bottom = Math.max(bottom, y);
      right += width + gap;
    }
    return { right, bottom };
  };

  // Folded parts become subgraphs, whose inputs and outputs are the links that cross their border.
  const folded = new Map();
  for (const entry of layout.groups.flatMap((group) => group.columns.flat())) {
    if (typeof entry !== "object") continue;
    place(entry.columns, 0, 0);
    const { node } = graph.convertToSubgraph(new Set(entry.columns.flat().map((key) => graph.getNodeById(key))));
    node.title = node.subgraph.name = entry.fold;
    node.properties.proxyWidgets = (entry.show ?? []).map((name) => name.split("."));
    const width = Math.max(
      minimumWidth, ruler.measureText(entry.fold).width + widgetPadding, ...(node.widgets ?? []).map(widgetWidth)
    );
    node.setSize([roundUp(width), roundUp(node.computeSize()[1])]);
    folded.set(entry, node);
  }

  // Groups stand side by side in rows; in a group, columns stand side by side over an optional note.
  const rows = new Map();
  for (const group of layout.groups) {
    const row = group.row ?? 0;
    if (!rows.has(row)) rows.set(row, []);
    rows.get(row).push(group);
  }
  let top = 0, right = 0;
  for (const row of [...rows.keys()].sort((a, b) => a - b)) {
    let left = 0, rowBottom = top;
    for (const group of rows.get(row)) {
      let { right: x, bottom } = place(group.columns, left + gap, top + groupTitle);
      if (group.note) {
        const note = addNote(group.note, Math.max(x - left - 2 * gap, 400));
        note.pos = [left + gap, bottom + titleHeight];
        bottom += titleHeight + note.size[1] + gap;
        x = Math.max(x, left + note.size[0] + 2 * gap);
      }
      const box = new LiteGraph.LGraphGroup(group.title);
      ruler.font = `${box.font_size}px Arial`;
      x = Math.max(x, left + roundUp(ruler.measureText(group.title).width) + 2 * gap);
      box.color = group.color ?? "#3f789e";
      box.pos = [left, top];
      box.size = [x - left, bottom - top];
      graph.add(box);
      right = Math.max(right, x);
      left = x + gap;
      rowBottom = Math.max(rowBottom, bottom);
    }
    top = rowBottom + gap;
  }
  // The whole workflow is in sight when it is opened, beside the page's side bar and below its menu.
  // Below 0.58 the page draws no text, so a workflow that almost fits is shown at that scale.
  const fitting = Math.min(0.8, 1640 / right, 830 / top);
  const scale = fitting > 0.55 ? Math.max(fitting, 0.58) : fitting;
  app.canvas.ds.scale = Math.round(scale * 100) / 100;
  app.canvas.ds.offset = [Math.round(90 / scale), Math.round(130 / scale)];
  graph.extra = { ...graph.extra, identityEdit: { version: pack.version } };
  const { output, workflow } = await app.graphToPrompt();
  return JSON.stringify({ output, workflow });
}
