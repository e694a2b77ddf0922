"""Responses written by hand, each with what it must earn and why: a row for every decision of the parser and the rules.

A row is (reason, design, response, accuracy, format, cross_reference, part of the explanation). Consistency has rows of
its own: (reason, response, effective characters, of how many).
"""

from crpo_jax.data.question import Question

GOUT = Question(
    id="gout",
    question=(
        "A 55-year-old man has sudden pain in the right big toe after a seafood dinner. His temperature is 38.2 °C. "
        "He has tophi on the ear, and serum uric acid is 9.1 mg/dL. Joint fluid shows needle-shaped crystals. "
        "What is the most likely diagnosis?"
    ),
    options={"A": "Septic arthritis", "B": "Pseudogout", "C": "Gout", "D": "Rheumatoid arthritis"},
    answer="C",
)

SYSTEM1 = (
    "(System 1: Intuitive) Sudden big toe pain after seafood brings gout to mind, with septic arthritis close behind."
)
SYSTEM2 = (
    "(System 2: Analytical) He has tophi on the ear, serum uric acid of 9.1 mg/dL and needle-shaped crystals in joint "
    "fluid. Septic arthritis would need bacteria in the culture. Pseudogout has rhomboid crystals. "
    "Rheumatoid arthritis spares the big toe."
)
DX = f"<dx>\n{SYSTEM1}\n{SYSTEM2}\n</dx>"
CITES = "The tophi on the ear and the needle-shaped crystals, with serum uric acid at 9.1 mg/dL, decide it."
END = f"<conclusion>\n{CITES} \\boxed{{C}}\n</conclusion>"
GOOD = f"{DX}\n{END}"


def boxed(box: str) -> str:
    """The good response with another box."""
    return GOOD.replace("\\boxed{C}", box)


def concluding(text: str) -> str:
    """The good analysis with another conclusion."""
    return f"{DX}\n<conclusion>\n{text}\n</conclusion>"


def analysing(text: str) -> str:
    """The good conclusion after another dx."""
    return f"<dx>\n{text}\n</dx>\n{END}"


Row = tuple[str, str, str, float, float, float, str]

ANSWERS: list[Row] = [
    ("the whole shape, right answer, whole findings cited", "crpo", GOOD, 1, 1, 1, "right"),
    ("a wrong letter loses accuracy only", "crpo", boxed("\\boxed{A}"), 0, 1, 1, "wrong: C is right"),
    ("no box, no answer", "crpo", boxed(""), 0, 1, 1, "no \\boxed"),
    ("the letter without a box is no answer", "crpo", boxed("C"), 0, 1, 1, "no \\boxed"),
    ("two boxes are no answer", "crpo", boxed("\\boxed{A} \\boxed{C}"), 0, 1, 1, "2 boxes"),
    ("two boxes that agree are still two", "crpo", boxed("\\boxed{C} \\boxed{C}"), 0, 1, 1, "2 boxes"),
    (
        "a box in dx only",
        "crpo",
        GOOD.replace("\\boxed{C}", "").replace("big toe.", "big toe. \\boxed{C}"),
        0,
        1,
        1,
        "outside the conclusion",
    ),
    (
        "a box in dx besides the one in the conclusion",
        "crpo",
        GOOD.replace("big toe.", "big toe. \\boxed{C}"),
        0,
        1,
        1,
        "2 boxes",
    ),
    ("a box after the conclusion", "crpo", boxed("") + "\n\\boxed{C}", 0, 0, 0, "outside the conclusion"),
    ("a box before dx", "crpo", "\\boxed{C}\n" + boxed(""), 0, 0, 0, "outside the conclusion"),
    (
        "a box between the parts",
        "crpo",
        f"{DX}\\boxed{{C}}<conclusion>{CITES}</conclusion>",
        0,
        0,
        0,
        "outside the conclusion",
    ),
    ("a point in the box", "crpo", boxed("\\boxed{C.}"), 0, 1, 1, "the box holds 'C.'"),
    ("parentheses in the box", "crpo", boxed("\\boxed{(C)}"), 0, 1, 1, "the box holds '(C)'"),
    ("white space in the box is LaTeX's own", "crpo", boxed("\\boxed{ C }"), 1, 1, 1, "right"),
    ("a line break in the box is white space too", "crpo", boxed("\\boxed{\nC\n}"), 1, 1, 1, "right"),
    ("a small letter is no option letter", "crpo", boxed("\\boxed{ c }"), 0, 1, 1, "the box holds 'c'"),
    ("LaTeX text in the box", "crpo", boxed("\\boxed{\\text{C}}"), 0, 1, 1, "the box holds '\\\\text{C}'"),
    ("LaTeX bold in the box", "crpo", boxed("\\boxed{\\textbf{C}}"), 0, 1, 1, "the box holds"),
    ("LaTeX mathematics in the box", "crpo", boxed("\\boxed{$C$}"), 0, 1, 1, "the box holds"),
    ("a second pair of braces", "crpo", boxed("\\boxed{{C}}"), 0, 1, 1, "the box holds '{C}'"),
    ("a full-width letter", "crpo", boxed("\\boxed{Ｃ}"), 0, 1, 1, "the box holds 'Ｃ'"),
    ("a Cyrillic letter that looks like C", "crpo", boxed("\\boxed{С}"), 0, 1, 1, "the box holds"),
    ("a zero-width space in the box", "crpo", boxed("\\boxed{C\u200b}"), 0, 1, 1, "the box holds"),
    ("a byte-order mark in the box", "crpo", boxed("\\boxed{\ufeffC}"), 0, 1, 1, "the box holds"),
    ("the option's text in the box", "crpo", boxed("\\boxed{Gout}"), 0, 1, 1, "the box holds 'Gout'"),
    ("letter and text in the box", "crpo", boxed("\\boxed{C) Gout}"), 0, 1, 1, "the box holds"),
    ("two letters in one box", "crpo", boxed("\\boxed{A, C}"), 0, 1, 1, "the box holds"),
    ("a letter that is no option", "crpo", boxed("\\boxed{E}"), 0, 1, 1, "not one of the letters A, B, C, D"),
    ("an empty box", "crpo", boxed("\\boxed{}"), 0, 1, 1, "the box holds ''"),
    ("the box's brace is not closed", "crpo", boxed("\\boxed{C"), 0, 1, 1, "without readable braces"),
    ("a box without braces", "crpo", boxed("\\boxed C"), 0, 1, 1, "without readable braces"),
    ("a space before the brace", "crpo", boxed("\\boxed {C}"), 0, 1, 1, "without readable braces"),
    ("an odd spelling is still a second box", "crpo", boxed("\\boxed {A} \\boxed{C}"), 0, 1, 1, "2 boxes"),
    ("boxed in words is no box", "crpo", boxed("boxed{C}"), 0, 1, 1, "no \\boxed"),
    ("an escaped backslash before it is still one box", "crpo", boxed("\\\\boxed{C}"), 1, 1, 1, "right"),
    ("dollars around the box are text", "crpo", boxed("$\\boxed{C}$"), 1, 1, 1, "right"),
    ("the box first, then the prose", "crpo", concluding(f"\\boxed{{C}} {CITES}"), 1, 1, 1, "right"),
    ("the prompt's own example, left standing", "crpo", boxed("\\boxed{LETTER}"), 0, 1, 1, "the box holds 'LETTER'"),
    ("the prompt's example besides the answer", "crpo", boxed("as in \\boxed{LETTER}: \\boxed{C}"), 0, 1, 1, "2 boxes"),
    (
        "a box torn by the end of the conclusion",
        "crpo",
        f"{DX}<conclusion>{CITES} \\boxed{{</conclusion>C}}",
        0,
        0,
        0,
        "outside the conclusion",
    ),
]

TAGS: list[Row] = [
    ("white space around and between the parts is free", "crpo", f"  \n{DX}\n\n\t\n{END}\r\n ", 1, 1, 1, ""),
    ("no white space between the parts is needed", "crpo", DX + END, 1, 1, 1, ""),
    ("a no-break space is white space", "crpo", f"{DX}\u00a0{END}", 1, 1, 1, ""),
    ("nothing at all", "crpo", "", 0, 0, 0, "no <dx>"),
    ("white space alone", "crpo", " \n\t ", 0, 0, 0, "no <dx>"),
    ("prose without tags", "crpo", f"{CITES} \\boxed{{C}}", 0, 0, 0, "no <conclusion>"),
    ("text before dx", "crpo", "Let me think. " + GOOD, 1, 0, 0, "text before <dx>"),
    ("text between the parts", "crpo", f"{DX} So: {END}", 1, 0, 0, "text between </dx> and <conclusion>"),
    ("text after the conclusion", "crpo", GOOD + " I hope this helps.", 1, 0, 0, "text after </conclusion>"),
    ("a zero-width space after the conclusion is text", "crpo", GOOD + "\u200b", 1, 0, 0, "text after </conclusion>"),
    ("a byte-order mark before dx is text", "crpo", "\ufeff" + GOOD, 1, 0, 0, "text before <dx>"),
    ("an end-of-turn token left in the text is text", "crpo", GOOD + "<|im_end|>", 1, 0, 0, "text after </conclusion>"),
    ("no <dx>", "crpo", GOOD.replace("<dx>", ""), 1, 0, 0, "no <dx>"),
    ("a lost </dx> does not cost the answer", "crpo", GOOD.replace("</dx>", ""), 1, 0, 0, "no </dx>"),
    ("no <conclusion>: nothing to answer in", "crpo", GOOD.replace("<conclusion>", ""), 0, 0, 0, "no <conclusion>"),
    ("cut off before </conclusion>", "crpo", GOOD.replace("</conclusion>", ""), 0, 0, 0, "no </conclusion>"),
    ("cut off within dx", "crpo", f"<dx>{SYSTEM1}", 0, 0, 0, "no </dx>"),
    ("dx alone", "crpo", DX, 0, 0, 0, "no <conclusion>"),
    ("the conclusion alone still answers", "crpo", END, 1, 0, 0, "no <dx>"),
    ("two conclusions", "crpo", GOOD + END, 0, 0, 0, "<conclusion> stands 2 times"),
    (
        "two conclusions, one without a box",
        "crpo",
        f"{GOOD}<conclusion>So it is gout, clearly.</conclusion>",
        0,
        0,
        0,
        "<conclusion> stands 2 times",
    ),
    ("two analyses", "crpo", DX + GOOD, 1, 0, 0, "<dx> stands 2 times"),
    ("everything twice", "crpo", GOOD + GOOD, 0, 0, 0, "2 boxes"),
    ("the conclusion first", "crpo", f"{END}\n{DX}", 1, 0, 0, "out of order"),
    ("dx within dx", "crpo", GOOD.replace(SYSTEM2, f"<dx>{SYSTEM2}</dx>"), 1, 0, 0, "<dx> stands 2 times"),
    ("a conclusion within dx is none", "crpo", f"<dx>{SYSTEM1}\n{SYSTEM2}{END}</dx>", 0, 0, 0, "out of order"),
    ("dx within the conclusion", "crpo", f"<conclusion>{DX}{CITES} \\boxed{{C}}</conclusion>", 0, 0, 0, "out of order"),
    (
        "the parts overlap",
        "crpo",
        f"<dx>{SYSTEM1}\n{SYSTEM2}<conclusion>{CITES}</dx> \\boxed{{C}}</conclusion>",
        0,
        0,
        0,
        "out of order",
    ),
    ("closed before it is opened", "crpo", f"</dx>{SYSTEM1}<dx>{END}", 1, 0, 0, "out of order"),
    (
        "a conclusion within a conclusion",
        "crpo",
        GOOD.replace(CITES, f"<conclusion>{CITES}</conclusion>"),
        0,
        0,
        0,
        "<conclusion> stands 2 times",
    ),
    ("capital tags are no tags", "crpo", GOOD.replace("dx>", "DX>"), 1, 0, 0, "no <dx>"),
    ("a space in a tag makes it none", "crpo", GOOD.replace("<dx>", "<dx >"), 1, 0, 0, "no <dx>"),
    ("a full-width tag is none", "crpo", GOOD.replace("<conclusion>", "＜conclusion＞"), 0, 0, 0, "no <conclusion>"),
    ("a zero-width character in a tag makes it none", "crpo", GOOD.replace("<dx>", "<d\u200bx>"), 1, 0, 0, "no <dx>"),
    ("square brackets are no tags", "crpo", GOOD.replace("<dx>", "[dx]").replace("</dx>", "[/dx]"), 1, 0, 0, "no <dx>"),
    ("an escaped slash is no end", "crpo", GOOD.replace("</dx>", "<\\dx>"), 1, 0, 0, "no </dx>"),
    ("other tags are text", "crpo", GOOD.replace("big toe.", "<b>big toe</b>."), 1, 1, 1, ""),
    ("think in place of dx", "crpo", GOOD.replace("dx>", "think>"), 1, 0, 0, "no <dx>"),
    ("think before dx is text", "crpo", "<think>Hm.</think>" + GOOD, 1, 0, 0, "text before <dx>"),
    ("less-than signs are text", "crpo", GOOD.replace("big toe.", "big toe, age < 60."), 1, 1, 1, ""),
]

SYSTEMS: list[Row] = [
    (
        "System 2 before System 1",
        "crpo",
        analysing(f"{SYSTEM2}\n{SYSTEM1}"),
        1,
        0,
        0,
        "System 2 stands before System 1",
    ),
    ("no System 1", "crpo", analysing(SYSTEM2), 1, 0, 0, "no System 1 heading"),
    ("no System 2", "crpo", analysing(SYSTEM1), 1, 0, 0, "no System 2 heading"),
    (
        "neither heading",
        "crpo",
        analysing("Tophi on the ear and needle-shaped crystals are seen, with 9.1 mg/dL."),
        1,
        0,
        0,
        "no System 1 heading",
    ),
    ("System 1 twice", "crpo", analysing(f"{SYSTEM1}\n{SYSTEM1}\n{SYSTEM2}"), 1, 0, 0, "more than one System 1"),
    ("System 2 twice", "crpo", analysing(f"{SYSTEM1}\n{SYSTEM2}\n{SYSTEM2}"), 1, 0, 0, "more than one System 2"),
    ("both on one line", "crpo", analysing(f"{SYSTEM1} {SYSTEM2}"), 1, 1, 1, ""),
    (
        "headings in bold",
        "crpo",
        GOOD.replace("(System 1: Intuitive)", "**System 1:**").replace("(System 2: Analytical)", "**System 2:**"),
        1,
        1,
        1,
        "",
    ),
    (
        "headings as titles",
        "crpo",
        GOOD.replace("(System 1: Intuitive)", "### System 1\n").replace("(System 2: Analytical)", "### System 2\n"),
        1,
        1,
        1,
        "",
    ),
    (
        "a heading in small letters is none",
        "crpo",
        GOOD.replace("(System 1", "(system 1"),
        1,
        0,
        0,
        "no System 1 heading",
    ),
    (
        "a heading with a zero-width space is none",
        "crpo",
        GOOD.replace("(System 1", "(System\u200b 1"),
        1,
        0,
        0,
        "no System 1 heading",
    ),
    (
        "a sentence about System 1 is no heading",
        "crpo",
        GOOD.replace("big toe.", "big toe. So System 1 was right here."),
        1,
        1,
        1,
        "",
    ),
    ("nor at the start of a line", "crpo", GOOD.replace("big toe.", "big toe.\nSystem 1 was right here."), 1, 1, 1, ""),
    ("System 12 is no System 1", "crpo", GOOD.replace("(System 1:", "(System 12:"), 1, 0, 0, "no System 1 heading"),
    (
        "System 2 in the conclusion only",
        "crpo",
        f"<dx>{SYSTEM1}</dx><conclusion>{SYSTEM2} {CITES} \\boxed{{C}}</conclusion>",
        1,
        0,
        0,
        "no System 2 heading",
    ),
    (
        "System 1 is empty",
        "crpo",
        analysing(f"(System 1: Intuitive)\n{SYSTEM2}"),
        1,
        0,
        0,
        "System 1 has 0 distinct words",
    ),
    (
        "System 2 is empty",
        "crpo",
        analysing(f"{SYSTEM1}\n(System 2: Analytical)"),
        1,
        0,
        0,
        "System 2 has 0 distinct words",
    ),
    (
        "System 1 in two words",
        "crpo",
        analysing(f"(System 1: Intuitive) Surely gout.\n{SYSTEM2}"),
        1,
        0,
        0,
        "System 1 has 2 distinct words",
    ),
    ("three words are enough", "crpo", analysing(f"(System 1: Intuitive) Gout most likely.\n{SYSTEM2}"), 1, 1, 1, ""),
    (
        "one word three times is one word",
        "crpo",
        analysing(f"(System 1: Intuitive) Gout gout gout.\n{SYSTEM2}"),
        1,
        0,
        0,
        "System 1 has 1 distinct words",
    ),
    (
        "dots are no content",
        "crpo",
        analysing(f"(System 1: Intuitive) ... ... ...\n{SYSTEM2}"),
        1,
        0,
        0,
        "System 1 has 0 distinct words",
    ),
    (
        "zero-width characters are no content",
        "crpo",
        analysing(f"(System 1: Intuitive) \u200b\u200b\u200b\n{SYSTEM2}"),
        1,
        0,
        0,
        "System 1 has 0",
    ),
    (
        "the paper's words for the parts are no content",
        "crpo",
        analysing(f"(System 1: Intuitive) First impression: intuitive pattern.\n{SYSTEM2}"),
        1,
        0,
        0,
        "System 1",
    ),
    ("a conclusion of a box alone", "crpo", concluding("\\boxed{C}"), 1, 0, 0, "the conclusion has 0 distinct words"),
    (
        "a conclusion of one word",
        "crpo",
        concluding("Gout. \\boxed{C}"),
        1,
        0,
        0,
        "the conclusion has 1 distinct words",
    ),
    ("an empty conclusion", "crpo", f"{DX}<conclusion></conclusion>", 0, 0, 0, "the conclusion has 0 distinct words"),
    (
        "empty sections throughout",
        "crpo",
        "<dx>(System 1:)(System 2:)</dx><conclusion>\\boxed{C}</conclusion>",
        1,
        0,
        0,
        "System 2 has 0",
    ),
]

# The good analysis with these conclusions and the right box: (reason, conclusion, cross_reference, explanation).
CONCLUSIONS: list[tuple[str, str, float, str]] = [
    ("one whole finding with its words, and a number", "Tophi on the ear and uric acid of 9.1 mg/dL mean gout.", 1, ""),
    ("two whole findings without any number", "Tophi on the ear and needle-shaped crystals mean gout.", 1, ""),
    ("other stop words within a finding", "Tophi of his ear and needle-shaped crystals mean gout.", 1, ""),
    ("plural and ending do not matter", "A needle-shaped crystal in joint fluids points to gout.", 1, ""),
    ("capitals do not matter", "TOPHI ON THE EAR and NEEDLE-SHAPED CRYSTALS mean gout.", 1, ""),
    ("a number with its unit written together", "Serum uric acid at 9.1mg/dL with tophi means gout.", 1, ""),
    ("naming the answer is no citation", "So the most likely diagnosis is gout.", 0, "0 cited terms"),
    (
        "naming all options is no citation",
        "Not septic arthritis, not pseudogout, not rheumatoid arthritis: gout.",
        0,
        "0 cited",
    ),
    (
        "a copied prompt is no citation",
        "The answer my analysis leads to and the findings from above that decide it.",
        0,
        "0 cited",
    ),
    ("words of argument are none either", "The findings suggest and support the most likely diagnosis.", 0, "0 cited"),
    ("nor the patient", "The patient presents with a history that explains it.", 0, "0 cited"),
    ("one word of a finding", "Because of the tophi it must be gout.", 0, "1 cited terms, 3 needed"),
    ("two words of a finding", "Because of tophi on the ear it is gout.", 0, "2 cited terms, 3 needed"),
    (
        "three words of three findings, none whole",
        "Because of tophi, crystals and seafood it is gout.",
        0,
        "0 whole case facts",
    ),
    ("a list of words", "Tophi, ear, crystals, serum, fluid, toe.", 0, "0 whole case facts"),
    (
        "a list without commas is no finding",
        "Fluid tophi ear crystals serum toe pain seafood.",
        0,
        "0 whole case facts",
    ),
    ("a finding turned round", "The ear has tophi, and the crystals look like a needle.", 0, "0 whole case facts"),
    (
        "a finding torn by a full stop",
        "I see tophi. The ear, the crystals, the fluid. It is gout.",
        0,
        "0 whole case facts",
    ),
    (
        "findings of the question that dx does not name",
        "The 55-year-old with a seafood dinner and 38.2 °C has gout.",
        0,
        "1 cited terms",
    ),
    (
        "terms of dx that the question does not have",
        "No bacteria in the culture and no rhomboid crystals, so gout.",
        0,
        "0 whole",
    ),
    ("invented findings", "Jaundice, ascites and spider angiomas of the chest show it.", 0, "0 cited terms"),
    ("the same finding twice", "With tophi on the ear and tophi on the ear it is gout.", 0, "distinct terms are"),
    ("one finding again and again", "Big toe pain, big toe pain and big toe pain: gout.", 0, "distinct terms are"),
    (
        "a copy of one sentence of dx",
        "He has tophi on the ear, serum uric acid of 9.1 mg/dL and needle-shaped crystals in joint fluid.",
        0,
        "copied",
    ),
    ("a short copy is one n-gram, and copied", "Septic arthritis would need bacteria.", 0, "1.00 of the word 8-grams"),
    ("another script in a finding hides it", "Tорhi on the еаr mean gout, as we have said before.", 0, "0 cited"),
    ("zero-width characters in words hide them", "Top\u200bhi on the e\u200bar mean gout here.", 0, "0 cited"),
    ("another number is not the case's", "Serum at 7.1 mg/dL, tophi and crystals mean gout.", 0, "0 whole case facts"),
    ("another unit is not the case's", "Acid at 9.1 mmol/L, tophi and crystals mean gout.", 0, "0 whole case facts"),
    ("a copy of dx", SYSTEM2.partition(") ")[2], 0, "copied from dx"),
    (
        "three hits in much unrelated prose",
        "Tophi on the ear and crystals aside, monks who brewed ale in cold stone cellars wrote long letters about "
        "weather, trade, rivers, bridges, taxes, weddings and the price of salt.",
        0,
        "cited terms are",
    ),
]

CITATIONS: list[Row] = [
    *(
        (reason, "crpo", concluding(f"{text} \\boxed{{C}}"), 1, 1, cited, why)
        for reason, text, cited, why in CONCLUSIONS
    ),
    (
        "terms of System 1 alone",
        "crpo",
        analysing(f"{SYSTEM1}\n(System 2: Analytical) Each was weighed and only one held up.").replace(
            CITES, "Sudden pain of the big toe decides it."
        ),
        *(1, 1, 0, "0 cited terms from System 2"),
    ),
    (
        "the patient's age is a number with its unit",
        "crpo",
        GOOD.replace("He has tophi", "This 55-year-old has tophi").replace(
            CITES, "A 55-year-old with tophi and crystals has gout."
        ),
        *(1, 1, 1, ""),
    ),
    ("no cross-reference without the format", "crpo", GOOD + " Done.", 1, 0, 0, "text after"),
    ("it counts for a wrong answer as well", "crpo", concluding(f"{CITES} \\boxed{{B}}"), 0, 1, 1, "wrong"),
]

THINK = "<think>Tophi on the ear mean gout.</think>"
GENERAL = THINK + "<answer>It is gout. \\boxed{C}</answer>"
OTHER_DESIGNS: list[Row] = [
    ("the general format", "grpo", GENERAL, 1, 1, 0, "right"),
    ("white space around and between", "grpo", f" {THINK}\n\n<answer>\\boxed{{C}}</answer>\n", 1, 1, 0, ""),
    ("the box alone is an answer part", "grpo", THINK + "<answer>\\boxed{C}</answer>", 1, 1, 0, ""),
    ("no thought", "grpo", "<think> </think><answer>\\boxed{C}</answer>", 1, 0, 0, "think is empty"),
    ("no answer", "grpo", THINK + "<answer></answer>", 0, 0, 0, "answer is empty"),
    ("text after the answer", "grpo", GENERAL + " Done.", 1, 0, 0, "text after </answer>"),
    ("text before the thought", "grpo", "So: " + GENERAL, 1, 0, 0, "text before <think>"),
    (
        "a box in the thought only",
        "grpo",
        "<think>\\boxed{C}</think><answer>Gout.</answer>",
        0,
        1,
        0,
        "outside the answer",
    ),
    ("two boxes", "grpo", GENERAL.replace("is gout.", "is \\boxed{C}."), 0, 1, 0, "2 boxes"),
    ("two thoughts", "grpo", THINK + GENERAL, 1, 0, 0, "<think> stands 2 times"),
    ("the parts out of order", "grpo", f"<answer>\\boxed{{C}}</answer>{THINK}", 1, 0, 0, "out of order"),
    ("the crpo tags are not the baseline's by default", "grpo", GOOD, 0, 0, 0, "no <think>"),
    ("no citation is looked for", "grpo", GENERAL.replace("It is gout.", CITES), 1, 1, 0, ""),
    ("released: format and a summary besides the box", "released", GENERAL, 1, 1, 0, "right"),
    ("released: a wrong letter", "released", GENERAL.replace("{C}", "{A}"), 0, 1, 0, "wrong"),
    ("released: any capital letter is a letter", "released", GENERAL.replace("{C}", "{Z}"), 0, 1, 0, "wrong"),
    ("released: a boxed non-letter", "released", GENERAL.replace("{C}", "{gout}"), -0.5, 1, 0, "no letter"),
    (
        "released: white space in the box is not forgiven",
        "released",
        GENERAL.replace("{C}", "{ C }"),
        -0.5,
        1,
        0,
        "no letter",
    ),
    ("released: an unreadable box", "released", GENERAL.replace("{C}", "{C"), -1, 1, 0, "unreadable"),
    (
        "released: a box over two lines is unreadable",
        "released",
        GENERAL.replace("{C}", "{\nC}"),
        -1,
        1,
        0,
        "unreadable",
    ),
    ("released: two boxes", "released", GENERAL.replace("is gout.", "is \\boxed{C}."), -2, 1, 0, "2 boxes"),
    ("released: three boxes", "released", GENERAL + "\\boxed{C} \\boxed{C}", -3, 0, 0, "3 boxes"),
    ("released: no box scores more than a wrong one", "released", THINK + "<answer>Gout.</answer>", 0, 1, 0, "0 boxes"),
    ("released: the box may stand anywhere", "released", "\\boxed{C}", 1, 0, 0, "right"),
    (
        "released: a backslash for the slash is mended",
        "released",
        GENERAL.replace("</think>", "<\\think>"),
        1,
        1,
        0,
        "",
    ),
    ("released: text after the answer", "released", GENERAL + " Done.", 1, 0, 0, "nothing else"),
    (
        "released: a second answer in the first passes",
        "released",
        GENERAL.replace("</answer>", "</answer></answer>"),
        1,
        1,
        0,
        "",
    ),
]

ROWS = [*ANSWERS, *TAGS, *SYSTEMS, *CITATIONS, *OTHER_DESIGNS]

CONSISTENCY: list[tuple[str, str, int, int]] = [
    ("nothing", "", 0, 0),
    ("white space alone", " \n\t", 0, 0),
    ("plain English", "Tophi on the ear.", 14, 14),
    ("names with accents", "Sjögren, Behçet, Ménière, Babeș", 28, 28),
    ("Greek letters as symbols", "β-blocker, α1, γδ T cells, ΔF508", 27, 27),
    ("units and signs of medicine", "38.2 °C, 5 µg ± 1 μg, ≥ 9 mg/dL → ↑ × ² ½ ♂ ♀ ✓ – “a”…", 35, 35),
    ("Greek words with accents", "ώρα", 2, 3),
    ("Chinese", "gout 痛风", 4, 6),
    ("Chinese punctuation", "gout，。", 4, 6),
    ("Russian", "боль", 0, 4),
    ("Cyrillic letters that look Latin", "Tорhi", 3, 5),
    ("Arabic and its digits", "ألم ٣", 0, 4),
    ("Vietnamese beyond Latin-1 and Latin Extended-A", "được", 2, 4),
    ("full-width letters", "ＡＢ12", 2, 4),
    ("zero-width characters", "a\u200bb\u200dc\ufeff", 3, 6),
    ("a soft hyphen and a direction mark", "a\u00adb\u202ec", 3, 5),
    ("emoji", "ok 👍", 2, 3),
    ("the replacement character", "a\ufffd", 1, 2),
    ("lone surrogates", "a\udcff\ud800", 1, 3),
    ("control characters", "a\x00\x07\x1b", 1, 4),
    ("private use", "a\uf0e0", 1, 2),
    ("another language in System 2", GOOD.replace("Pseudogout has rhomboid crystals.", "可能如此。"), 398, 403),
]
