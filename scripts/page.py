"""ComfyUI's real page in a headless Chromium: what the page tests and page_workflows.py share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from api_client import Prompt
from engine import Server
from environment import ScriptError
from playwright.sync_api import BrowserContext, Page, Route, sync_playwright

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

PATIENCE = 300_000
"""Milliseconds for the page to come up: on a busy machine it takes minutes."""

SETTINGS = {
    "Comfy.TutorialCompleted": True,  # otherwise the template browser covers the canvas of a new user
    "Comfy.InstalledVersion": "1.32.9",
    "Comfy.Workflow.WarnBlueprintOverwrite": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Minimap.Visible": False,
}


def find_chromium() -> str:
    """The path of a Chromium; installs Debian's package where that is possible. Raises ScriptError with the reason."""
    for name in CHROMIUM_NAMES:
        path = shutil.which(name)
        if path:
            return path
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("apt-get"):
        raise ScriptError("no Chromium is installed: install the package chromium to run what needs the page")
    print("Installing the package chromium ...", flush=True)
    variables = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
        done = subprocess.run(["apt-get", "-qq", *command], env=variables, capture_output=True, text=True)
        if done.returncode:
            raise ScriptError(f"apt-get {command[0]} failed, so there is no Chromium: {done.stderr.strip()[-300:]}")
    path = shutil.which("chromium")
    if not path:
        raise ScriptError("the package chromium was installed, but there is no command chromium")
    return path


@contextmanager
def open_page(server: Server, language: str = "en", nodes_2: bool = False) -> Iterator[Page]:
    """The page of a running server, ready to take a workflow, in a new browser profile. Only the server is reached.

    language: one of the page's own ("zh", "ja", ...), as in its setting "Comfy.Locale".
    nodes_2: "Nodes 2.0", the page's newer way to draw nodes, as elements instead of on a canvas.
    """
    settings = server.base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps({**SETTINGS, "Comfy.Locale": language, "Comfy.VueNodes.Enabled": nodes_2}))
    with tempfile.TemporaryDirectory(prefix="chromium-") as profile, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=find_chromium(),
            args=CHROMIUM_FLAGS,
            viewport={"width": 1800, "height": 1000},
        )
        try:
            page = _open(context, server)
            if language != "en":
                _keep_translations(page, language)
            yield page
        finally:
            context.close()


def _open(context: BrowserContext, server: Server) -> Page:
    def only_the_server(route: Route) -> None:
        if route.request.url.startswith((server.url, "data:", "blob:")):
            route.continue_()
        else:
            route.abort()

    context.route("**/*", only_the_server)
    page = context.pages[0]
    page.goto(server.url, timeout=PATIENCE)
    page.wait_for_function("window.app?.vueAppReady && window.app.graph", timeout=PATIENCE)
    page.wait_for_function("Object.keys(LiteGraph.registered_node_types).length > 100", timeout=PATIENCE)
    return page


def _keep_translations(page: Page, language: str) -> None:
    """Give the page the translations of custom nodes once more where it has lost them.

    Frontend 1.32, ComfyUI 0.3.75's, gets them from the server first and the translations of its own afterwards, which
    replace them. The one of ComfyUI 0.4.0 (1.33.13) and newer ones merge both, and nothing is done here.
    """
    script = """async language => {
        const vue = document.querySelector("#vue-app").__vue_app__;
        const { nodeDefs, ...others } = (await (await fetch("/api/i18n")).json())[language];
        if (Object.keys(nodeDefs).every(id => vue.config.globalProperties.$te(`nodeDefs.${id}.display_name`))) return;
        const provided = Object.getOwnPropertySymbols(vue._context.provides).map(key => vue._context.provides[key]);
        const i18n = provided.find(value => value?.global?.mergeLocaleMessage);
        i18n.global.mergeLocaleMessage(language, { nodeDefs, ...others });
        await app.registerNodes();
    }"""
    loaded = """language => document.querySelector("#vue-app").__vue_app__.config.globalProperties
        .$te("nodeDefs.KSampler.display_name", language)"""
    page.wait_for_function(loaded, arg=language, timeout=120_000)
    page.evaluate(script, language)


def load_workflow(page: Page, workflow: dict[str, Any], name: str) -> list[str]:
    """Open a page workflow as the template browser does. Returns the node types that the page does not know."""
    script = """async ([workflow, name]) => {
        await app.loadGraphData(workflow, true, true, name, { openSource: "template" });
        const known = LiteGraph.registered_node_types;
        return workflow.nodes.map(node => node.type).filter(type => !(type in known));
    }"""
    return page.evaluate(script, [workflow, name])


def choose_template(page: Page, pack: str, name: str) -> None:
    """Open a workflow as a user does: the template browser, the pack's name in it, the workflow's card."""
    # The thumbnails of ComfyUI's own templates are many and large, and nobody looks at them here.
    page.route("**/templates/*.webp", lambda route: route.abort())
    page.locator(".templates-tab-button").first.click()
    dialog = page.get_by_role("dialog")
    dialog.locator("nav").get_by_role("button").filter(has_text=pack).click()
    dialog.get_by_test_id(f"template-workflow-{name}").click()
    dialog.wait_for(state="detached")


def drawn_texts(page: Page, node_id: int | str) -> list[str]:
    """Every text that the page draws on its canvas for a node at full size, as it is drawn: a cut one ends with "…".

    The node is brought into sight. What is an element of its own above the canvas (a text field) is not among them.
    """
    script = """async (id) => {
        const node = app.graph.getNodeById(id) ?? app.graph.getNodeById(String(id));
        const view = app.canvas.ds, texts = [];
        view.scale = 1;
        view.offset = [400 - node.pos[0], 200 - node.pos[1]];
        app.canvas.setDirty(true, true);
        const draw = CanvasRenderingContext2D.prototype.fillText;
        CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
            if (app.canvas.current_node === node) texts.push(String(text));
            return draw.call(this, text, ...rest);
        };
        const drawNode = app.canvas.drawNode;
        app.canvas.drawNode = function (one, context) {
            const before = app.canvas.current_node;
            app.canvas.current_node = one;
            try { return drawNode.call(this, one, context); } finally { app.canvas.current_node = before; }
        };
        try { app.canvas.draw(true, true); } finally {
            CanvasRenderingContext2D.prototype.fillText = draw;
            app.canvas.drawNode = drawNode;
        }
        return texts;
    }"""
    return page.evaluate(script, node_id)


def to_prompt(page: Page) -> Prompt:
    """The open workflow in the API format, exactly as the page would queue it."""
    return json.loads(page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)"))


def take_notices(page: Page) -> list[str]:
    """The texts of the notices that the page shows over its canvas (warnings, errors); they are closed."""
    page.wait_for_timeout(300)  # a notice comes a moment after its cause
    notices = page.locator(".p-toast-message")
    texts = notices.all_inner_texts()
    for _ in texts:
        page.locator(".p-toast-close-button").first.click()
    notices.first.wait_for(state="detached")
    return texts
