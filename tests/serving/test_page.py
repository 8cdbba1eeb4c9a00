"""The page at "/", as a person uses it: in a real browser, against a server whose texts are known.

Each test also holds that nothing but the server is asked, that the console stays empty (a violated
Content-Security-Policy would speak there) and that no exception is left over.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gptsmith import GPTConfig, SamplingSettings, complete
from gptsmith.config.settings import GREEDY
from gptsmith.generation.conversation import Conversation
from gptsmith.machine.pages import read_page
from gptsmith.serving.pages import WRITING
from gptsmith.tokenizers import byte_tokenizer
from gptsmith.tokenizers.chat import ALPACA, open_template, with_template
from tests.conftest import TINY, scrambled
from tests.serving import running as real
from tests.serving.page_stub import KEY, serving

pytestmark = pytest.mark.slow

PICTURES = Path(__file__).parents[2] / "build" / "page"
PROMPT = "It was the last night of the year, and the lamp was lit."


@pytest.fixture
def server_url() -> Iterator[str]:
    with serving() as stub:
        yield stub.url


@dataclass
class Visit:
    """A page, what it asked /v1/completions, and what the console may say of refused requests."""

    page: Any
    asked: list[dict[str, Any]] = field(default_factory=list)
    refused: int = 0
    broken: bool = False

    def write(self, prompt: str = PROMPT, **fields: Any) -> None:
        self.page.fill("#prompt", prompt)
        if samples := fields.pop("n", None):
            self.page.locator(".steps label", has_text=str(samples)).click()
        for name, value in fields.items():
            self.page.fill(f"#{name}", str(value))
        self.page.keyboard.press("Control+Enter")

    def finished(self, number: int = 0) -> str:
        """Waits for the end of a sample; what it was."""
        sheet = self.page.locator(".sheet").nth(number).and_(self.page.locator("[data-finish]"))
        return str(sheet.get_attribute("data-finish"))

    def until(self, expression: str, seconds: float = 60) -> None:
        """Waits for it to hold; the policy keeps the browser's own waiting from evaluating it."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"not in {seconds} s: {expression}"
            self.page.wait_for_timeout(20)

    def text(self, number: int = 0) -> str:
        return str(self.page.locator(".text").nth(number).text_content())

    def tokens(self, number: int = 0) -> Any:
        return self.page.locator(".text").nth(number).locator(".token")


@pytest.fixture
def visit(browser: Any, server_url: str) -> Iterator[Callable[..., Visit]]:
    """Opens the page in a fresh profile; at the end, nothing bad may have happened in it."""
    contexts, visits, said, elsewhere = [], [], [], []

    def opened(url: str, **options: Any) -> Visit:
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(60_000)
        visit = Visit(context.new_page())
        visits.append(visit)

        def note(request: Any) -> None:
            if not request.url.startswith((url, "data:")):
                elsewhere.append(request.url)
            if request.url.endswith("/completions"):
                visit.asked.append(json.loads(request.post_data))

        visit.page.on("request", note)
        visit.page.on("console", lambda message: said.append(message.text))
        visit.page.on("pageerror", lambda error: said.append(str(error)))
        visit.page.goto(url)
        visit.until("document.title.includes('·') || !trouble.hidden")
        return visit

    yield opened
    for context in contexts:
        context.close()
    assert not elsewhere
    refused = [message for message in said if "responded with a status of 4" in message]
    assert len(refused) == sum(visit.refused for visit in visits)
    broken = [m for m in said if "net::ERR_" in m and any(visit.broken for visit in visits)]
    assert [message for message in said if message not in (*refused, *broken)] == []


# -- writing


def test_a_text_streams_in_and_tells_how_it_went(visit: Any, server_url: str) -> None:
    here = visit(server_url)
    assert here.page.inner_text("#context") == "context 1,024"
    assert "slots busy" in here.page.inner_text("#health")
    here.write(max_tokens=60, seed=0)
    assert here.finished() == "length"
    [asked] = here.asked
    assert asked["prompt"] == PROMPT
    settings = {"temperature": 0.8, "top_p": 1, "max_tokens": 60, "n": 1, "seed": 0}
    assert {name: asked[name] for name in settings} == settings
    assert "top_k" not in asked
    assert here.tokens().count() == 60
    figures = here.page.inner_text(".figures")
    assert re.search(r"60 tokens\s+\d+ tokens/s\s+first after \d+ ms\s+seed 0", figures), figures
    assert here.page.inner_text("#news") == "Finished: 60 tokens in 1 texts."


def test_the_same_seed_again_and_retry_with_another(visit: Any, server_url: str) -> None:
    here = visit(server_url)
    here.write(max_tokens=9)
    here.finished()
    seed, text = here.asked[0]["seed"], here.text()
    here.write(seed=seed)
    here.until("document.querySelector('#stop').disabled")
    assert here.text() == text
    here.page.click("#retry")
    here.until(f"!document.querySelector('.figures').innerText.match({seed})")
    assert here.finished() == "length"
    assert here.asked[2]["seed"] != seed
    assert here.page.input_value("#seed") == ""


@pytest.mark.parametrize("by", ["button", "Escape"])
def test_stopped_half_way_and_continued(visit: Any, server_url: str, by: str) -> None:
    here = visit(server_url)
    here.write(f"slow. {PROMPT}")
    here.tokens().nth(4).wait_for()
    here.page.click("#stop") if by == "button" else here.page.keyboard.press(by)
    assert here.finished() == "stopped"
    text = here.text()
    here.page.wait_for_timeout(120)
    assert here.text() == text
    assert 5 <= here.tokens().count() < 60
    here.page.fill("#max_tokens", "3")
    here.page.click("text=Continue")
    here.until("document.querySelector('[data-finish=length]')")
    assert here.asked[1]["prompt"] == text
    assert here.text().startswith(text)
    assert len(here.text()) > len(text)


def test_samples_stand_side_by_side(visit: Any, server_url: str) -> None:
    here = visit(server_url, permissions=["clipboard-read", "clipboard-write"])
    here.write(n=2, seed=7, max_tokens=40)
    assert [here.finished(i) for i in range(2)] == ["length"] * 2
    left, right = (here.page.locator(".sheet").nth(i).bounding_box() for i in range(2))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    assert here.text(0) != here.text(1)
    second = here.text(1)
    here.page.locator("text=Copy").nth(1).click()
    here.page.wait_for_selector("text=Copied")
    assert here.page.evaluate("navigator.clipboard.readText()") == second
    here.write(n=1, seed=8)  # the second sample's, by itself
    here.until("document.querySelectorAll('[data-finish]').length == 1")
    assert here.text() == second


def test_characters_of_several_tokens_stay_whole(visit: Any, server_url: str) -> None:
    here = visit(server_url)
    here.write(max_tokens=150, seed=0)
    here.finished()
    assert "thirty years — and" in here.text()
    assert "“Eleven,” he said" in here.text()
    assert "sleep. 🚢\n" in here.text()
    title = here.page.locator("#popup h2")
    here.tokens().nth(14).click()  # a space, and two bytes of the dash
    assert title.inner_text() == "‹20 e2 80› part of a character"
    assert here.page.locator(".choice[aria-current]").is_disabled()
    here.page.keyboard.press("ArrowRight")  # the third byte
    assert title.inner_text() == "‹94› completes —"
    here.page.click(".choice[aria-current]")
    here.until("document.querySelector('[data-finish]')")
    assert here.asked[1]["prompt"].endswith("ships each evening for thirty years —")


# -- tokens


def test_a_token_tells_what_else_might_have_been(visit: Any, server_url: str) -> None:
    here = visit(server_url)
    with here.page.expect_response("**/completions") as answered:
        here.write(max_tokens=30, seed=3)
    here.finished()
    events = re.findall(r"^data: (\{.*)", answered.value.text(), flags=re.MULTILINE)
    scored = [json.loads(event)["choices"][0]["logprobs"] for event in events]
    logprobs = [logprob for part in scored for logprob in part["token_logprobs"]]
    tops = [top for part in scored for top in part["top_logprobs"]]
    for place in (0, 11, 29):
        here.page.mouse.move(2, 2)
        here.page.wait_for_selector("#popup", state="hidden")
        here.tokens().nth(place).hover()
        here.page.wait_for_selector(".token.open")
        expect = f"{-logprobs[place] / math.log(2):.2f}"[:4]
        here.until(f"popup.root.innerText.includes('{expect} bits')")
        told = here.page.locator(".choice").evaluate_all(
            "all => all.map((one) => one.dataset.share)"
        )
        shares = sorted((math.exp(value) for value in tops[place].values()), reverse=True)
        assert [float(share.strip("<% ")) for share in told] == pytest.approx(
            [100 * share for share in shares], rel=0.01, abs=0.001
        )


def test_a_walk_by_keyboard(visit: Any, server_url: str) -> None:
    here = visit(server_url)
    here.write(max_tokens=80, seed=1)
    here.finished()
    focused = "() => [...document.querySelectorAll('.token')].indexOf(document.activeElement)"
    here.page.focus("#seed")
    for _ in range(4):  # the three buttons, of which Stop has no turn, and the text
        if here.page.evaluate(focused) == 0:
            break
        here.page.keyboard.press("Tab")
    places = []
    for key in "ArrowRight ArrowRight ArrowLeft End ArrowRight Home".split():
        here.page.keyboard.press(key)
        places.append(here.page.evaluate(focused))
    assert places == [1, 2, 1, 79, 79, 0]
    assert here.page.locator(".token[tabindex]").count() == 1
    assert here.page.is_visible("#popup")
    here.page.keyboard.press("Enter")
    here.page.keyboard.press("ArrowDown")
    assert here.page.evaluate("document.activeElement.matches('li:nth-child(2) .choice')")
    here.page.keyboard.press("Escape")
    assert here.page.is_hidden("#popup")
    assert here.page.evaluate(focused) == 0


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_an_alternative_branches_and_undo_goes_back(visit: Any, server_url: str, by: str) -> None:
    here = visit(server_url)
    here.write(max_tokens=20, seed=21)
    here.finished()
    whole = here.text()
    before = PROMPT + "".join(here.tokens().all_text_contents()[:12])
    here.tokens().nth(12).click()
    choice = here.page.locator(".choice:enabled:not([aria-current])").first
    other = here.page.locator(".choice:enabled:not([aria-current]) code").first.inner_text()
    choice.click() if by == "mouse" else choice.press("Enter")
    here.page.wait_for_selector("[data-finish]")
    branch = before + other.replace("␣", " ").replace("⏎", "\n")
    assert here.asked[1]["prompt"] == branch
    assert here.asked[1]["n"] == 1
    here.until("document.querySelectorAll('.token').length == 33")
    assert here.text().startswith(branch)
    assert here.page.is_hidden("#popup")
    here.page.click("text=Undo")
    assert here.text() == whole


# -- what goes wrong


def test_a_refusal_is_told_in_one_line_and_the_old_text_stays(visit: Any, server_url: str) -> None:
    here = visit(server_url)
    here.write(max_tokens=5)
    here.finished()
    here.write("forbidden")
    here.refused = 1
    here.page.wait_for_selector("#trouble:visible")
    assert here.page.inner_text("#trouble") == "the prompt has 1,200 tokens: shorten it"
    assert here.tokens().count() == 5
    assert here.page.is_disabled("#stop")


def test_a_full_queue_says_when_and_offers_to_try_again(visit: Any, server_url: str) -> None:
    here = visit(server_url)
    here.write("busy", max_tokens=5)
    here.refused = 1
    here.page.wait_for_selector("#again:visible")
    assert "the queue is full The server asks to wait 3 s." in here.page.inner_text("#trouble")
    here.page.click("#again")
    assert here.finished() == "length"
    assert here.page.is_hidden("#trouble")


@pytest.mark.parametrize(
    ("prompt", "told"), [("vanish", "went away"), ("stumble", "the model stumbled")]
)
def test_a_broken_stream_keeps_what_came(
    visit: Any, server_url: str, prompt: str, told: str
) -> None:
    here = visit(server_url)
    here.write(prompt, seed=0)
    assert here.finished() == "broken"
    assert told in here.page.inner_text("#trouble p")
    assert here.tokens().count() == 6
    assert here.page.is_visible("text=Continue")
    here.broken = prompt == "vanish"


def test_an_api_key_is_asked_for_and_forgotten_with_the_tab(visit: Any) -> None:
    with serving(key=KEY) as stub:
        here = visit(stub.url)
        here.refused = 2
        here.page.fill("#key input", "wrong")
        here.page.click("#key button")
        here.page.wait_for_selector("#key:visible")
        here.page.fill("#key input", KEY)
        here.page.keyboard.press("Enter")
        here.until("$('model').innerText == 'harbour'")
        here.write(max_tokens=4)
        assert here.finished() == "length"
        here.page.reload()
        here.until("document.title.startsWith('harbour')")
        assert KEY not in here.page.evaluate("JSON.stringify(localStorage) + document.cookie")
        here.page.close()  # before there is nobody to ask


# -- the page itself


def test_settings_survive_a_reload(visit: Any, server_url: str) -> None:
    here = visit(server_url)
    here.page.locator("#temperature").fill("1.35")
    here.write("A < b", n=3, top_k=40, max_tokens=2, seed=5)
    here.finished()
    here.page.reload()
    kept = here.page.evaluate("Object.fromEntries(new FormData(document.querySelector('#desk')))")
    assert kept == {
        "prompt": "A < b",
        "temperature": "1.35",
        "top_p": "1",
        "top_k": "40",
        "max_tokens": "2",
        "n": "3",
        "seed": "5",
    }
    assert here.page.inner_text("output[for=temperature]") == "1.35"
    here.page.evaluate("localStorage.setItem('gptsmith.settings', '{broken')")
    here.page.reload()
    assert here.page.input_value("#max_tokens") == "128"


def test_nothing_that_is_written_becomes_html(visit: Any, server_url: str) -> None:
    here = visit(server_url)
    here.write("<img src=x onerror=alert(1)><script>alert(2)</script>", max_tokens=3)
    here.finished()
    assert here.text().startswith("<img src=x onerror=alert(1)><script>")
    assert here.page.locator("main img, main script").count() == 0
    page = read_page(WRITING)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", page)
    assert not re.search(r"<[^>!]+\s(style|on\w+)=", page)


CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const light = (...colours) => {
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    const parts = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => part / 255)
      .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const paper = getComputedStyle(document.querySelector(".sheet")).backgroundColor;
  return [...document.querySelectorAll(".token, .given, .figures span")].map((span) => {
    const { backgroundColor, color } = getComputedStyle(span);
    const [low, high] = [light(paper, backgroundColor), light(color)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_can_be_read(visit: Any, server_url: str, scheme: str) -> None:
    here = visit(server_url, color_scheme=scheme, reduced_motion="reduce")
    here.write(max_tokens=150, n=2, seed=9)
    here.finished()
    heat = here.tokens().evaluate_all(
        "all => all.map((one) => one.style.getPropertyValue('--heat'))"
    )
    assert min(map(float, heat)) < 0.02
    assert max(map(float, heat)) > 0.99 - 0.01
    assert min(here.page.evaluate(CONTRASTS)) >= 4.5
    paper = here.page.evaluate("getComputedStyle(document.querySelector('.sheet')).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 384) == (scheme == "dark")
    assert here.tokens().first.evaluate("one => getComputedStyle(one).animationName") == "none"


def test_a_phone_stacks_the_samples_and_never_scrolls_sideways(visit: Any, server_url: str) -> None:
    phone = {"width": 360, "height": 740}
    here = visit(server_url, viewport=phone, has_touch=True, color_scheme="dark")
    here.write(PROMPT + " " + "m" * 200, n=2, seed=9, max_tokens=70)
    here.finished(1)
    boxes = [here.page.locator(".sheet").nth(i).bounding_box() for i in range(2)]
    assert boxes[0]["y"] + boxes[0]["height"] < boxes[1]["y"]
    assert here.page.evaluate("document.documentElement.scrollWidth") == 360
    here.tokens(1).nth(35).scroll_into_view_if_needed()
    here.tokens(1).nth(35).tap()
    popup = here.page.locator("#popup").bounding_box()
    assert popup["x"] >= 0
    assert popup["x"] + popup["width"] <= 360
    PICTURES.mkdir(parents=True, exist_ok=True)
    here.page.screenshot(path=PICTURES / "phone-dark.png")


def test_the_desk_has_its_picture_taken(visit: Any, server_url: str) -> None:
    here = visit(server_url, viewport={"width": 1360, "height": 860})
    here.write(n=2, seed=9, max_tokens=110)
    here.finished(1)
    here.tokens().nth(20).hover()
    here.page.wait_for_selector("#popup:visible")
    PICTURES.mkdir(parents=True, exist_ok=True)
    here.page.screenshot(path=PICTURES / "desk-light.png")
    assert (PICTURES / "desk-light.png").stat().st_size > 20_000


def test_only_a_reader_at_the_end_is_taken_along(visit: Any, server_url: str) -> None:
    here = visit(server_url, viewport={"width": 1000, "height": 400})
    here.write("slow", max_tokens=400, seed=0)
    here.until("scrollY > 100")
    here.page.mouse.wheel(0, -2000)
    here.until("scrollY == 0")
    count = here.tokens().count()
    here.tokens().nth(count + 5).wait_for()
    assert here.page.evaluate("scrollY") == 0


def test_a_long_text_grows_without_being_drawn_again(visit: Any, server_url: str) -> None:
    here = visit(server_url)
    here.write(max_tokens=600, seed=0)
    here.tokens().first.wait_for()
    here.tokens().first.evaluate("one => { one.mark = 'the same node'; }")
    here.until("document.querySelector('[data-finish]')", 15)
    assert here.tokens().count() == 600
    assert here.tokens().first.evaluate("one => one.mark") == "the same node"


# -- a conversation


@pytest.fixture
def chat_url() -> Iterator[str]:
    with serving(chat=True) as stub:
        yield stub.url


def say(here: Visit, text: str) -> None:
    here.page.fill("#message", text)
    here.page.keyboard.press("Enter")


def answered(here: Visit, number: int = 0) -> str:
    """Waits for the end of an answer; how it ended."""
    bubble = here.page.locator(".bubble.assistant").nth(number)
    return str(bubble.and_(here.page.locator("[data-finish]")).get_attribute("data-finish"))


def messages(here: Visit) -> list[dict[str, str]]:
    """What the page last asked an answer to."""
    return list(here.asked[-1]["messages"])


def test_a_model_that_cannot_talk_has_no_talk(visit: Any, server_url: str) -> None:
    here = visit(server_url)
    here.until("document.title === 'harbour · gptsmith'")
    assert not here.page.locator("#modes").is_visible()
    assert not here.page.locator("#talk").is_visible()
    assert here.page.locator("#prompt").is_visible()


def test_a_conversation_goes_back_and_forth(visit: Any, chat_url: str) -> None:
    here = visit(chat_url)
    here.page.wait_for_selector("#message:visible")
    assert here.page.evaluate("document.activeElement.id") == "message"
    assert not here.page.locator("#prompt, .scale, #generate").first.is_visible()
    here.page.fill("#system", "Be brief.")
    here.page.fill("#max_tokens", "12")
    say(here, "Good evening")
    assert answered(here) == "length"
    assert here.page.locator(".bubble.user").inner_text() == "Good evening"
    assert here.page.locator(".remark").inner_text() == "length reached"
    (first,) = here.page.locator(".bubble.assistant").all_text_contents()
    assert first.startswith("You said: Good evening\n The keeper")
    system = {"role": "system", "content": "Be brief."}
    question = {"role": "user", "content": "Good evening"}
    assert messages(here) == [system, question]
    assert here.asked[-1]["temperature"] == 0.8
    here.page.fill("#max_tokens", "900")
    here.page.focus("#message")
    here.page.keyboard.type("Two")
    here.page.keyboard.press("Shift+Enter")
    here.page.keyboard.type("lines")
    here.page.keyboard.press("Enter")
    assert answered(here, 1) == "stop"
    answer = {"role": "assistant", "content": first}
    assert messages(here) == [system, question, answer, {"role": "user", "content": "Two\nlines"}]
    here.page.click("#reset")
    assert here.page.locator("#bubbles > *").count() == 0
    here.page.fill("#system", "")
    say(here, "Anew")
    answered(here)
    assert messages(here) == [{"role": "user", "content": "Anew"}]


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_an_answer_can_be_stopped(visit: Any, chat_url: str, way: str) -> None:
    here = visit(chat_url)
    here.page.wait_for_selector("#message:visible")
    say(here, "slow, please")
    here.until("document.querySelector('.bubble.assistant')?.textContent.length > 30")
    assert not here.page.locator("#send").is_visible()
    if way == "Escape":
        here.page.keyboard.press("Escape")
    else:
        here.page.click("#hush")
    assert answered(here) == "stopped"
    kept = here.page.locator(".bubble.assistant").text_content()
    here.page.wait_for_timeout(200)
    assert here.page.locator(".bubble.assistant").text_content() == kept
    say(here, "Go on")
    answered(here, 1)
    assert messages(here)[1] == {"role": "assistant", "content": kept}


def test_a_refused_message_can_be_changed(visit: Any, chat_url: str) -> None:
    here = visit(chat_url)
    here.page.wait_for_selector("#message:visible")
    here.refused = 1
    say(here, "forbidden")
    here.until("!trouble.hidden")
    assert "the chat template refuses" in here.page.inner_text("#trouble")
    assert here.page.locator(".bubble").count() == 0
    assert here.page.input_value("#message") == "forbidden"
    say(here, "Allowed")
    assert answered(here) == "stop"
    assert not here.page.locator("#trouble").is_visible()


def test_an_answer_that_breaks_off_is_kept(visit: Any, chat_url: str) -> None:
    here = visit(chat_url)
    here.page.wait_for_selector("#message:visible")
    here.broken = True
    say(here, "vanish")
    assert answered(here) == "broken"
    assert here.page.locator(".bubble.assistant").text_content().startswith("You said: vanish")
    here.until("!trouble.hidden")
    assert "went away" in here.page.inner_text("#trouble")


def test_the_oldest_turns_leave_a_full_context(visit: Any, chat_url: str) -> None:
    here = visit(chat_url)
    here.page.wait_for_selector("#message:visible")
    here.page.fill("#system", "Stay.")
    here.page.fill("#max_tokens", "3")
    here.refused = 1
    for number in range(4):
        say(here, f"Question {number}")
        answered(here, number)
    asked = [message["content"] for message in messages(here) if message["role"] != "assistant"]
    assert asked == ["Stay.", "Question 2", "Question 3"]
    assert "no longer reads" in here.page.locator(".divider").inner_text()
    assert here.page.locator(".bubble").count() == 8


def test_the_choice_between_talking_and_writing_is_remembered(visit: Any, chat_url: str) -> None:
    here = visit(chat_url)
    here.page.wait_for_selector("#message:visible")
    here.page.locator("#modes label", has_text="Write").click()
    here.write(max_tokens=5)
    here.finished()
    assert not here.page.locator("#talk").is_visible()
    here.page.reload()
    here.page.wait_for_selector("#modes:visible")
    assert here.page.locator("#prompt").is_visible()
    here.page.locator("#modes label", has_text="Talk").click()
    say(here, "Hello")
    answered(here)


BUBBLES = "all => all.map((one) => one.getBoundingClientRect()).map((b) => [b.left, b.right])"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1360, 860), (360, 740)])
def test_a_talk_has_its_picture_taken(
    visit: Any, chat_url: str, scheme: str, size: tuple[int, int]
) -> None:
    width, height = size
    viewport = {"width": width, "height": height}
    here = visit(chat_url, viewport=viewport, color_scheme=scheme, has_touch=width < 500)
    here.page.wait_for_selector("#message:visible")
    here.page.fill("#max_tokens", "40")
    say(here, "Who keeps the light?")
    answered(here)
    here.page.fill("#max_tokens", "9")
    say(here, "And " + "m" * 90 + "?")
    answered(here, 1)
    here.page.fill("#message", "Tell me of the ship")
    remark = here.page.locator(".remark").last.bounding_box()
    assert remark["y"] + remark["height"] <= here.page.locator("#type").bounding_box()["y"] + 1
    assert here.page.evaluate("document.documentElement.scrollWidth") == width
    assert here.page.locator("main").bounding_box()["width"] > 0.6 * min(width, 1000)
    for left, right in here.page.locator(".bubble").evaluate_all(BUBBLES):
        assert 0 <= left < right <= width
    box = here.page.locator("#type").bounding_box()
    assert height - 60 <= box["y"] + box["height"] <= height + 1  # where the thumb is
    assert (
        min(
            here.page.evaluate(
                CONTRASTS.replace(".token, .given, .figures span", ".bubble").replace(
                    ".sheet", ".bubble.assistant"
                )
            )
        )
        >= 4.5
    )
    PICTURES.mkdir(parents=True, exist_ok=True)
    here.page.screenshot(path=PICTURES / f"talk-{width}-{scheme}.png")


# -- with the server itself


def test_a_tuned_model_answers_on_the_page(visit: Any, tmp_path: Path) -> None:
    tokenizer = with_template(byte_tokenizer(), ALPACA)
    model = scrambled(GPTConfig(**(TINY | {"vocab_size": 257, "context_length": 300})))
    template = open_template(tmp_path, tokenizer)
    assert template is not None
    talk = Conversation(model, tokenizer, template, sampling=GREEDY, max_tokens=20)
    expected = ["".join(talk.answer(text)) for text in ("Hello", "Well?")]
    with real.serving(model, tokenizer, template=template) as server:
        here = visit(server.url)
        here.page.wait_for_selector("#message:visible")
        here.page.fill("#max_tokens", "20")
        here.page.fill("#temperature", "0")
        for number, text in enumerate(("Hello", "Well?")):
            say(here, text)
            answered(here, number)
        assert here.page.locator(".bubble.assistant").all_text_contents() == expected
        here.page.close()


def test_what_the_model_writes_is_what_the_page_shows(visit: Any) -> None:
    model = scrambled(GPTConfig(**(TINY | {"vocab_size": 257, "context_length": 90})))
    how: dict[str, Any] = {"max_tokens": 40, "sampling": SamplingSettings(temperature=0.8)}
    written = complete(model, byte_tokenizer(), "A lamp.", num_samples=2, seed=3, **how)
    with real.serving(model, byte_tokenizer(), key=KEY) as server:
        here = visit(server.url)
        here.refused = 1
        here.page.fill("#key input", KEY)
        here.page.keyboard.press("Enter")
        here.until("document.querySelector('#context').textContent === 'context 90'")
        here.write("A lamp.", n=2, seed=3, max_tokens=40)
        assert [here.finished(number) for number in (0, 1)] == ["length", "length"]
        shown = [here.text(number) for number in (0, 1)]
        # A byte that is no character is shown by the same sign everywhere.
        assert shown == ["A lamp." + text for text in written]
        here.tokens().nth(20).hover()
        here.page.wait_for_selector("#popup:visible")
        popup = here.page.inner_text("#popup")
        assert re.search(r"probability\s+[\d.e-]+%", popup), popup
        here.write("x" * 91)
        here.until("!trouble.hidden")
        here.refused += 1
        assert "the model's context_length is 90" in here.page.inner_text("#trouble")
        assert server.served.service.counts() == (0, 0)
        here.page.close()  # before there is nobody to ask


ASK = """async ([url, key]) => {
    const headers = {"content-type": "application/json", authorization: `Bearer ${key}`};
    const body = JSON.stringify({model: "toy", prompt: "a", max_tokens: 2});
    const answer = await fetch(`${url}/v1/completions`, {method: "POST", headers, body});
    return [answer.status, answer.headers.get("x-request-id"), await answer.json()];
}"""


def test_an_app_of_another_origin_may_ask_where_that_is_allowed(browser: Any) -> None:
    """And no other may, with the same name for the same machine."""
    model = scrambled(GPTConfig(**(TINY | {"vocab_size": 257})))
    with (
        real.serving(model, byte_tokenizer()) as app,
        real.serving(model, byte_tokenizer(), key="k", origins=("http://x", app.url)) as server,
    ):
        page = browser.new_page()
        page.goto(f"{app.url}/health")
        for key, status in (("k", 200), ("wrong", 401)):
            got, id, body = page.evaluate(ASK, [server.url, key])
            assert (got, id[:4]) == (status, "req_")
            assert ("choices" in body) is (status == 200)
        page.goto(f"{app.url.replace('127.0.0.1', 'localhost')}/health")
        with pytest.raises(Exception, match="Failed to fetch"):
            page.evaluate(ASK, [server.url, "k"])
        page.close()
