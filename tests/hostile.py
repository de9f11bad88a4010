"""Texts that strangers may send as a prompt, each of which is to be drawn like any other."""

PROMPTS = {
    "NUL": "a\0b",
    "control characters": "".join(map(chr, range(32))) + "a" + "".join(map(chr, range(0x7F, 0xA0))),
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f4\U000e0067\U000e007f",
    "right to left": "\u202e\u0645\u0631\u062d\u0628\u0627\u2066",
    "combining": "e" + "\u0301" * 3000,
    "zero width": "\u200b\ufeff\u2060",
    "not characters": "\ufffe\uffff\U0010ffff",
    "as long as it may be": "x" * 8000,
    "as long as it may be, four bytes each": "\U0001f600" * 8000,
    "special tokens": "<|endoftext|></s><pad><extra_id_0><unk> ",
    "markup": "<script>alert(1)</script> ${jndi:ldap://x} %s {0} '; DROP TABLE",
}
