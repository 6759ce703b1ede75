#!/usr/bin/env python3
"""The server's page in a headless Chromium: it streams, stops, shows the engine, keeps texts as texts, fits a phone, and breaks no rule of its
policy. Screenshots go to $BUILD/page."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import browser
import case_help
from case_help import check
from serve_help import Server

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("BUILD", "build"))
# A chat template for the bundled model, which continues texts: turns follow each other.
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
EVIL = "<img src=x onerror=document.title='taken'><script>document.title='taken'</" + "script>"


def shards(folder, template):
    """The bundled model, with a chat template or without."""
    source = Path(folder) / "source"
    shutil.copytree(ROOT / "tests/model", source)
    if template:
        (source / "chat_template.jinja").write_text(template)
    subprocess.run([BUILD / "tpshard", "--quiet", "--tp", "2", "--quant", "int4", source, Path(folder) / "shards"], check=True)
    return Path(folder) / "shards"


LAST = "[...document.querySelectorAll('.turn:not(.user)')].at(-1)"
DONE = f"!!{LAST} && !!{LAST}.querySelector('.foot button')"


def ask(page, text):
    page.run("document.getElementById('text').focus()")
    page.write(text)
    page.key("Enter", windowsVirtualKeyCode=13)


def set_field(page, name, value):
    page.run(f"document.getElementById('{name}').value = {json.dumps(value)}")


def chat(page, server, shots):
    page.view(1280, 800)
    page.open(f"http://127.0.0.1:{server.port}/")
    check("page_state_is_shown", page.wait("document.getElementById('state').textContent === 'ready'"),
           page.run("document.getElementById('state').textContent"))
    page.shoot(shots / "begin.png")
    set_field(page, "temperature", "0")
    set_field(page, "max_tokens", "400")
    page.run("window.lengths = new Set(); new MutationObserver(() => lengths.add(document.getElementById('log').textContent.length))"
             ".observe(document.getElementById('log'), {childList: true, subtree: true, characterData: true})")
    ask(page, "And the LORD said unto Moses,")
    page.wait(DONE)
    lengths = page.run("[...lengths]")
    check("page_streams", len(lengths) > 3, f"the text was seen at lengths {lengths}")
    check("page_answers", page.wait(f"{DONE} && {LAST}.querySelector('p').textContent.length > 20"), page.run(f"{LAST}.textContent"))
    check("page_counts_tokens", "400 tokens" in page.run(f"{LAST}.textContent"), page.run(f"{LAST}.textContent"))
    time.sleep(1.2)  # the engine's figures are read once a second
    check("page_shows_ranks", page.run("document.querySelectorAll('#ranks tr').length") == 2, "not two ranks")
    check("page_shows_rate", page.run("document.getElementById('line').getAttribute('points')"), "no line")
    page.shoot(shots / "chat.png")

    before = page.run(f"{LAST}.textContent")
    page.run(f"[...{LAST}.querySelectorAll('.foot button')].find(b => b.textContent === 'Again').click()")
    page.wait(DONE)
    check("page_asks_again", page.run("document.querySelectorAll('.turn').length") == 2 and
           page.run(f"{LAST}.querySelector('p').textContent") in before, page.run(f"{LAST}.textContent"))


def stop(page, server):
    set_field(page, "max_tokens", "900")
    ask(page, "Behold,")
    page.wait("!document.getElementById('stop').hidden")
    page.run("document.getElementById('stop').click()")
    stopped = page.wait(f"{DONE} && {LAST}.textContent.includes('stopped')", 5)
    check("page_stops", stopped, page.run(f"{LAST}.textContent")[-200:])
    end = time.monotonic() + 5
    while json.loads(server.get("/v1/stats"))["scheduler"]["running"] and time.monotonic() < end:
        time.sleep(0.05)
    check("page_stop_frees_the_engine", json.loads(server.get("/v1/stats"))["scheduler"]["running"] == 0, "it goes on")


def evil(page):
    set_field(page, "max_tokens", "5")
    ask(page, EVIL)
    page.wait(DONE)
    # The same as an answer: what render makes of a model's text.
    page.run("window.box = document.createElement('div'); document.body.append(box); render(box, " +
             json.dumps(EVIL + "\n\n```html\n" + EVIL + "\n```\n`" + EVIL + "`") + ")")
    time.sleep(0.2)
    check("page_keeps_text_text", page.run("document.title") == "tpengine" and
           page.run("box.querySelectorAll('img, script').length + document.querySelectorAll('#log img, #log script').length") == 0 and
           page.run("box.textContent.split('onerror').length") == 4, page.run("box.innerHTML"))
    page.run("box.remove()")
    blocked = page.run("new Promise(done => { document.addEventListener('securitypolicyviolation', () => done(true), {once: true});"
                       "const s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s);"
                       "setTimeout(() => done(false), 2000); })")
    check("page_policy_refuses_other_scripts", blocked and page.run("document.title") == "tpengine", "a script ran")
    page.complaints = [text for text in page.complaints if "Content Security Policy" not in text]


def phone(page, server, shots):
    page.view(360, 740, phone=True, dark=True)
    page.open(f"http://127.0.0.1:{server.port}/")
    page.wait("document.getElementById('state').textContent === 'ready'")
    set_field(page, "max_tokens", "60")
    ask(page, "In the beginning")
    page.wait(DONE)
    check("page_fits_a_phone", page.run("document.documentElement.scrollWidth") <= 360, page.run("document.documentElement.scrollWidth"))
    page.shoot(shots / "phone-dark.png")
    page.run("document.getElementById('show').click()")
    check("page_fits_a_phone_engine", page.run("document.documentElement.scrollWidth") <= 360 and
           page.run("getComputedStyle(document.getElementById('side')).display") != "none", "the engine's view is not shown or too wide")
    time.sleep(1.2)
    page.shoot(shots / "phone-engine.png")
    unnamed = page.run("[...document.querySelectorAll('button, input, textarea')].filter(e => !e.textContent.trim() && !e.labels?.length && "
                       "!e.getAttribute('aria-label')).map(e => e.id)")
    check("page_names_its_controls", unnamed == [], unnamed)


def keys_and_texts(page, folder):
    """A model without a chat template, behind a key."""
    with Server(shards(folder, None), "--api-key", "secret") as server:
        page.view(1280, 800)
        page.open(f"http://127.0.0.1:{server.port}/")
        check("page_asks_for_the_key", page.wait("document.getElementById('state').textContent === 'needs a key'"),
               page.run("document.getElementById('state').textContent"))
        page.complaints = [text for text in page.complaints if "401" not in text]
        page.run("{ const key = document.getElementById('key'); key.value = 'secret'; key.dispatchEvent(new Event('change')); }")
        page.wait("document.getElementById('state').textContent === 'ready'")
        check("page_continues_texts", page.wait("document.querySelector('.hello').textContent.includes('continues')"),
               page.run("document.querySelector('.hello').textContent"))
        set_field(page, "max_tokens", "30")
        set_field(page, "temperature", "0")
        ask(page, "And God said,")
        page.wait(DONE)
        check("page_completes_with_a_key", page.run(f"{LAST}.querySelector('p')?.textContent.length > 20"), page.run(f"{LAST}.textContent"))


def main():
    if not browser.find() or os.environ.get("TEST_QUICK"):
        print("ok page # SKIP " + ("this build is too slow for a browser" if browser.find() else "no Chromium here"))
        return 0
    page_size = (ROOT / "engine/serve/page.html").stat().st_size
    check("page_is_small", page_size <= 60 << 10, f"{page_size} bytes")
    shots = BUILD / "page"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "plain").mkdir()
        with Server(shards(folder, TEMPLATE)) as server:
            code, headers, body = server.ask("GET", "/")
            check("page_is_served", code == 200 and body == (ROOT / "engine/serve/page.html").read_text(), code)
            policy = headers.get("Content-Security-Policy") or ""
            check("page_policy_is_strict", "default-src 'none'" in policy and "unsafe" not in policy, policy)
            page = browser.Browser()
            try:
                chat(page, server, shots)
                stop(page, server)
                evil(page)
                phone(page, server, shots)
                keys_and_texts(page, Path(folder) / "plain")
                check("page_without_complaints", not page.complaints, page.complaints)
            finally:
                page.close()
    return case_help.status()


if __name__ == "__main__":
    sys.exit(main())
