"""A changed flag rolls out and no request fails; a broken change is said, and takes no good pod with it."""

import pytest
from support.kubectl import Kubectl, Manifest, condition, is_true, wait_for
from support.manifests import llm
from support.traffic import ask, load, start_client, wait_ready


def uids(pods: list[Manifest]) -> set[str]:
    return {pod["metadata"]["uid"] for pod in pods}


def is_seen(llm: Manifest) -> bool:
    return bool(llm["status"]["observedGeneration"] == llm["metadata"]["generation"])


def wait_rolled_out(kubectl: Kubectl, name: str, old: set[str]) -> None:
    wait_for(
        "new pods alone",
        lambda: (
            is_true(kubectl.llm(name), "RolloutComplete")
            and is_true(kubectl.llm(name), "Ready")
            and not uids(kubectl.pods(name)) & old
        ),
        timeout_s=180,
        describe=kubectl.describe_all,
    )


def test_a_change_under_load_fails_no_request(kubectl: Kubectl, server_image: str) -> None:
    start_client(kubectl, server_image)
    # While a new server starts on the same two cores, kube-proxy may be seconds late to hear of the old one's end.
    kubectl.apply(llm("rolling", drain={"timeout": "30s", "preStop": "10s"}))
    wait_ready(kubectl, "rolling")
    old = uids(kubectl.pods("rolling"))
    with load(kubectl, "rolling") as result:
        kubectl.patch("llm", "rolling", {"spec": {"engine": {"maxNumSeqs": 4}}})
        wait_rolled_out(kubectl, "rolling", old)
        wait_for(
            "the old pod is gone",
            lambda: len(kubectl.list("pods", "quire.dev/deployment=rolling,app.kubernetes.io/component=server")) == 1,
            timeout_s=90,
        )
    print(f"\n{result.answered} requests answered during the rollout")
    assert result.answered > 20
    assert result.num_failed == 0, result.failures
    same = uids(kubectl.pods("rolling"))
    kubectl.patch("llm", "rolling", {"spec": {"scaling": {"scaleDownDelay": "7m"}}})
    kubectl.patch("llm", "rolling", {"metadata": {"labels": {"team": "blue"}}})
    wait_for(
        "the change is seen",
        lambda: (
            kubectl.llm("rolling")["status"]["observedGeneration"] == kubectl.llm("rolling")["metadata"]["generation"]
        ),
        timeout_s=30,
    )
    assert uids(kubectl.pods("rolling")) == same, "a change that no pod needs made new pods"


def test_a_broken_change_is_said_and_reverted(kubectl: Kubectl, server_image: str) -> None:
    start_client(kubectl, server_image)
    kubectl.apply(llm("breaking"))
    wait_ready(kubectl, "breaking")
    good = uids(kubectl.pods("breaking"))
    with load(kubectl, "breaking", 1) as result:
        kubectl.patch("llm", "breaking", {"spec": {"engine": {"extraArgs": ["--tokenizer=/nowhere"]}}})
        wait_for(
            "a REASON that names the flag",
            lambda: "--tokenizer" in kubectl.llm("breaking")["status"]["reason"],
            timeout_s=120,
            describe=kubectl.describe_all,
        )
        print("\n" + kubectl("get", "llm"))
        status = kubectl.llm("breaking")
        assert is_true(status, "Ready")
        assert condition(status, "RolloutComplete")["status"] == "False"
        assert good <= uids(kubectl.pods("breaking"))
        kubectl.patch("llm", "breaking", {"spec": {"engine": {"extraArgs": []}}})
        wait_for(
            "as before",
            lambda: uids(kubectl.pods("breaking")) == good and is_true(kubectl.llm("breaking"), "RolloutComplete"),
            timeout_s=120,
            describe=kubectl.describe_all,
        )
        assert kubectl.llm("breaking")["status"]["reason"] == ""
    assert result.num_failed == 0, result.failures


def test_an_impossible_image_takes_nothing_down(kubectl: Kubectl, server_image: str) -> None:
    start_client(kubectl, server_image)
    kubectl.apply(llm("imaged"))
    wait_ready(kubectl, "imaged")
    template = {"spec": {"containers": [{"name": "server", "image": "quire.invalid/no-such-image:1"}]}}
    kubectl.patch("llm", "imaged", {"spec": {"podTemplate": template}})
    wait_for(
        "a REASON about the image",
        lambda: "no-such-image" in kubectl.llm("imaged")["status"]["reason"],
        timeout_s=120,
        describe=kubectl.describe_all,
    )
    assert is_true(kubectl.llm("imaged"), "Ready")
    assert ask(kubectl, "imaged", "Hello")["chunks"] > 0


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"resources": None, "profile": "no-such-profile"}, ("spec.profile", "no-such-profile")),
        ({"podTemplate": {"spec": {"nodeSelecter": {"disk": "fast"}}}}, ("spec.podTemplate", "nodeSelecter")),
    ],
    ids=["profile", "typo"],
)
def test_a_spec_that_cannot_work_changes_nothing(
    kubectl: Kubectl, server_image: str, bad: Manifest, words: tuple[str, ...]
) -> None:
    start_client(kubectl, server_image)
    kubectl.apply(llm("stubborn"))
    wait_ready(kubectl, "stubborn")
    deployment = kubectl.get("deployment", "stubborn")
    kubectl.patch("llm", "stubborn", {"spec": bad})
    wait_for(
        "Accepted=False",
        lambda: condition(kubectl.llm("stubborn"), "Accepted")["status"] == "False",
        timeout_s=30,
        describe=kubectl.describe_all,
    )
    message = condition(kubectl.llm("stubborn"), "Accepted")["message"]
    assert all(word in message for word in words), message
    print("\n" + kubectl("get", "llm"))
    after = kubectl.get("deployment", "stubborn")
    assert deployment is not None
    assert after is not None
    assert after["metadata"]["generation"] == deployment["metadata"]["generation"]
    assert ask(kubectl, "stubborn", "Hello")["chunks"] > 0
