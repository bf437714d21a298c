import pytest
import torch
from heads.distributions import FEATURES, summary_of

from deferral_train.errors import InputError
from deferral_train.heads import GapHead
from deferral_train.heads.features import TRANSFORMS, FeatureSet
from deferral_train.rules.summary import FIELDS, Summary, summarize


def test_features_are_the_named_fields_transformed_in_groups():
    summary = summary_of(20)
    features = FeatureSet(FEATURES)
    out = features(features.columns(summary))
    named = {}
    for (transform, _), _block in zip(features.groups, features.groups):
        for feature in features.features:
            if feature.transform == transform:
                named[str(feature)] = TRANSFORMS[transform](summary[feature.name])
    for column, value in zip(out.T, named.values()):
        torch.testing.assert_close(column, value)
    assert out.shape == (20, len(FEATURES))


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if f.sees in ("verifier", "both")])
def test_draft_stage_refuses_every_field_of_the_verifier_by_name(name):
    widths = {"verifier_hidden": 4} if name == "verifier_hidden" else None
    with pytest.raises(InputError, match=name):
        GapHead(["drafter_max", name], stage="draft", widths=widths)


def test_draft_stage_refuses_a_derived_feature_that_needs_the_verifier():
    with pytest.raises(InputError, match="argmaxes_differ"):
        GapHead(["argmaxes_differ"], stage="draft")


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (["drafter_mx"], "drafter_mx"),
        (["drafter_max:cube"], "cube"),
        (["tv", "tv"], "repeat"),
        ([], "non-empty"),
        ("tv", "non-empty"),
        (["drafter_hidden"], "width"),
    ],
)
def test_wrong_features_are_named(features, said):
    with pytest.raises(InputError, match=said):
        GapHead(features)


def test_missing_field_is_named_when_called():
    with pytest.raises(InputError, match="kl"):
        GapHead(["kl", "tv"]).gap(Summary({"tv": torch.zeros(3)}))


def test_hidden_states_become_their_width_in_columns():
    head = GapHead(
        ["drafter_max", "drafter_hidden"], stage="draft", widths={"drafter_hidden": 6}, hidden=(4,)
    )
    summary = Summary({"drafter_max": torch.rand(2, 3), "drafter_hidden": torch.randn(2, 3, 6)})
    assert head.columns(summary).shape == (2, 3, 7)
    assert head.gap(summary).shape == (2, 3)
    wrong = summary.with_fields({"drafter_hidden": torch.randn(2, 3, 5)})
    with pytest.raises(InputError, match="width 5"):
        head.gap(wrong)


def test_schema_hash_sees_order_transform_and_stage():
    base = FeatureSet(["drafter_max", "drafter_entropy"]).schema_hash
    others = [
        FeatureSet(["drafter_entropy", "drafter_max"]),
        FeatureSet(["drafter_max:logit", "drafter_entropy"]),
        FeatureSet(["drafter_max", "drafter_entropy"], stage="draft"),
    ]
    assert len({base, *(other.schema_hash for other in others)}) == 4


def test_normalisation_matches_numpy_and_survives_blocks():
    head = GapHead(FEATURES)
    x = head.columns(summary_of(1000, seed=3))
    head.fit_normalisation([x[:300], x[300:301], x[301:]])
    z = head.inputs(x).double().numpy()
    torch.testing.assert_close(head.mean.double().numpy(), z.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(1 / head.scale.double().numpy(), z.std(0), rtol=1e-4, atol=1e-6)


def test_drafted_token_feature_reads_the_token():
    q, p = torch.randn(5, 7), torch.randn(5, 7)
    token = q.argmax(-1)
    token[0] = (token[0] + 1) % 7
    summary = summarize(q, p, token=token)
    columns = FeatureSet(["token_is_argmax"], stage="draft").columns(summary)
    assert columns[:, 0].tolist() == [0, 1, 1, 1, 1]
