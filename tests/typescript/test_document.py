"""docs/from-typescript.md: its two flows are the same."""

import re

from tests.conftest import ROOT
from tests.database.conftest import Session
from tests.typescript.test_compile import CompileFlow


def test_the_two_flows_of_the_document_are_the_same(
    session: Session, compile_flow: CompileFlow
) -> None:
    text = (ROOT / "docs/from-typescript.md").read_text()
    [typescript] = re.findall(r"```typescript\n(.*?)```", text, re.DOTALL)
    [python] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile_flow(typescript)
    assert session.deploy(python) == [("placeOrder", "verified", [])]
