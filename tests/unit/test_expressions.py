"""The words for models and references: parsed, written back, refused."""

import pytest

from salsa.config.expressions import (
    SFT,
    Base,
    Given,
    RecipeSoup,
    ReferenceRule,
    Shrunk,
    Soup,
    parse_model,
    parse_reference,
    sft_indices,
    text_of,
)

MODELS = {
    "base": Base(),
    "sft[3]": SFT(3),
    "soup": RecipeSoup(),
    "soup[0, 2]": Soup((SFT(0), SFT(2))),
    "soup(0.75*sft[0], 0.25*sft[1])": Soup((SFT(0), SFT(1)), (0.75, 0.25)),
    "soup(0*sft[0], 1*base)": Soup((SFT(0), Base()), (0.0, 1.0)),
    "soup(sft[0], runs/x)": Soup((SFT(0), Given("runs/x"))),
    "shrink(soup[0,1], base, 0.7)": Shrunk(Soup((SFT(0), SFT(1))), 0.7),
    "shrink(sft[0], base, 0.3333334)": Shrunk(SFT(0), 0.3333334),
    "shrink(sft[0], base, soup)": Shrunk(SFT(0), RecipeSoup()),
    "org/name": Given("org/name"),
}
REFERENCES = {
    "soup": ReferenceRule((RecipeSoup(),)),
    "mixture(sft[0], soup[0,1], base)": ReferenceRule(
        (SFT(0), Soup((SFT(0), SFT(1))), Base()), (1 / 3,) * 3
    ),
    "mixture(0.25*sft[0], 0.75*soup)": ReferenceRule((SFT(0), RecipeSoup()), (0.25, 0.75)),
    "ema(soup, 0.01)": ReferenceRule((RecipeSoup(),), ema=0.01),
    "reset(sft[1], 10)": ReferenceRule((SFT(1),), reset_every=10),
    "reset(sft[1], 10, optimizer)": ReferenceRule((SFT(1),), reset_every=10, reset_optimizer=True),
    "none": ReferenceRule((SFT(0),), pulls=False),
}


@pytest.mark.parametrize("text", MODELS)
def test_models(text):
    model = parse_model(text)
    assert model == MODELS[text] and parse_model(text_of(model)) == model


def test_shares_are_told_apart_in_every_digit():
    """A stage is known by its text; six digits made one of two that differ in the seventh."""
    third = "shrink(sft[0], base, {})"
    texts = [text_of(parse_model(third.format(n))) for n in ("0.3333333", "0.3333334", "1", "0.70")]
    assert texts == [third.format(n) for n in ("0.3333333", "0.3333334", "1", "0.7")]


@pytest.mark.parametrize("text", REFERENCES)
def test_references(text):
    assert parse_reference(text, init="sft[0]") == REFERENCES[text]


def test_indices():
    of = lambda text: sft_indices(parse_model(text), (0, 2))
    assert of("soup") == (0, 2) == of("soup[0, 2]") == of("shrink(soup, base, 0.5)")
    assert of("shrink(sft[1], base, soup)") == (1, 0, 2) and of("soup(0.5*sft[3], 0.5*base)") == (
        3,
    )
    assert of("base") == of("a/path") == ()


@pytest.mark.parametrize(
    "text", ["mixture(sft[0], sft[1])", "sft", "sft[x]", "soup(0.5*sft[0])", "ema(soup, 0.1)"]
)
def test_what_names_no_model(text):
    with pytest.raises(ValueError, match="names no model|two models or more"):
        parse_model(text)
