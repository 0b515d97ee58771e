r"""What PixArt-alpha's text encoder saw of a caption: `clean_caption` of DeepFloyd IF, twice, as diffusers has it.

It is what alpha's released weights were trained with, and no good rule otherwise: it takes lower case first, so that
ftfy knows no damaged accent any more, and drops Chinese characters, long numbers and words such as "download".

Its expressions try anew from each character of a text without spaces, which takes minutes for 20,000 of them. Here they
give the same and begin once in each run of characters: what fits from further on in a run fits from its beginning, too.
"""

import contextlib
import html
import re
import urllib.parse
import warnings

_TOP_LEVEL = "com|co|ru|net|org|edu|gov|it"
# An address without a scheme, and where one may begin; of one with a scheme, what comes after that stays.
_BARE_ADDRESS = re.compile(r"[a-zA-Z0-9.\-]+[.](?:" + _TOP_LEVEL + r")[\w/-]*\b\/?(?!@)")
_BARE_START, _BARE_RUN = re.compile(r"\b(?=[a-zA-Z0-9.\-])"), re.compile(r"[a-zA-Z0-9.\-]+")
_SCHEMES = [re.compile(rf"\b{scheme}:(?:\/{{1,3}}|[a-zA-Z0-9%])") for scheme in ("https?", "www")]
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    r"[\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030\u30A0\uFE31\uFE32\uFE58"
    r"\uFE63\uFF0D]+"
)
_BAD_PUNCTUATION = "[#®•©™&@·º½¾¿¡§~" + r"\)\(\]\[\}\{\|\\\/\*]{1,}"

Rules = tuple[tuple[re.Pattern[str], str], ...]


def _compiled(*rules: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


# In order: after HTML is taken out, after damaged characters are mended, and at the ends.
AFTER_HTML = _compiled(
    (r"@[\w\d]+\b", ""),  # names of people's accounts
    (r"[\u31c0-\u31ef]+", ""),  # CJK strokes, and the blocks after them up to the unified ideographs
    (r"[\u31f0-\u31ff]+", ""),
    (r"[\u3200-\u32ff]+", ""),
    (r"[\u3300-\u33ff]+", ""),
    (r"[\u3400-\u4dbf]+", ""),
    (r"[\u4dc0-\u4dff]+", ""),
    (r"[\u4e00-\u9fff]+", ""),
    (_DASHES, "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # ids of articles
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"(?<!\S)\S+\.(?:{_FILES})", ""),
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (_BAD_PUNCTUATION, " "),
    (r"(?<!\s)\s+\.\s+", " "),
)
JOINTS, MANY_JOINTS = re.compile(r"(?:\-|\_)"), 3  # this-is-my-cute-cat
AFTER_MENDING = _compiled(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+(?:\.\d*)?[xх×]\d+(?:\.\d*)?\b", ""),  # 1024x768, also with a Cyrillic x
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_caption(text: str) -> str:
    """Return a text as alpha's training and diffusers' pipelines with `clean_caption=True` hand it to the tokenizer."""
    return _clean_once(_clean_once(text))


def _clean_once(text: str) -> str:
    import ftfy
    from bs4 import BeautifulSoup
    from bs4.builder import ParserRejectedMarkup

    text = urllib.parse.unquote_plus(text).strip().lower().replace("<person>", "person")
    for scheme in _SCHEMES:
        text = _without_addresses(text, scheme)
    # Warnings are of texts that look like the name of a file or an address. Marks that the parser refuses, as
    # "<![ x", at which diffusers ends, stay.
    with warnings.catch_warnings(action="ignore"), contextlib.suppress(ParserRejectedMarkup):
        text = BeautifulSoup(text, features="html.parser").text
    text = _replaced(text, AFTER_HTML)
    if len(JOINTS.findall(text)) > MANY_JOINTS:
        text = JOINTS.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _replaced(text, AFTER_MENDING).strip()


def _replaced(text: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _without_addresses(text: str, scheme: re.Pattern[str]) -> str:
    """Return a text without what fits `scheme` or is an address without one, whichever comes first each time."""
    kept, place = [], 0
    with_scheme, bare = scheme.search(text), _next_bare_address(text, 0)
    while with_scheme is not None or bare is not None:
        is_bare = with_scheme is None or (bare is not None and bare.start() < with_scheme.start())
        found = bare if is_bare else with_scheme
        assert found is not None
        kept.append(text[place : found.start()])
        place = found.end()
        if with_scheme is not None and with_scheme.start() < place:
            with_scheme = scheme.search(text, place)
        if bare is not None and bare.start() < place:
            bare = _next_bare_address(text, place)
    return "".join([*kept, text[place:]])


def _next_bare_address(text: str, place: int) -> re.Match[str] | None:
    """Return the first address without a scheme from a place on."""
    while (start := _BARE_START.search(text, place)) is not None:
        if (found := _BARE_ADDRESS.match(text, start.start())) is not None:
            return found
        run = _BARE_RUN.match(text, start.start())
        assert run is not None
        place = run.end()
    return None
