"""Using a page by keyboard alone: moving the focus with Tab, and checking that it stays visible."""

from playwright.sync_api import Locator, Page

MAX_TABS = 250  # a page with more stops than this is not usable by keyboard

_IS_VISIBLE = """element => {
  const { outlineStyle, outlineWidth } = getComputedStyle(element);
  const shown = element.matches("input[type=radio]") ? element.closest("label") : element;
  const { width, height } = shown.getBoundingClientRect();
  const isOutlined = outlineStyle !== "none" && parseFloat(outlineWidth) > 0;
  return width > 1 && height > 1 && (isOutlined || getComputedStyle(shown).outlineStyle !== "none");
}"""


class KeyboardUser:
    """A person who has no mouse. ``reach`` presses Tab until an element has the focus."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def reach(self, target: Locator) -> None:
        """Move the focus to the element. Fails if Tab never reaches it, or if its focus is not visible."""
        for _ in range(MAX_TABS):
            if target.evaluate("element => element === document.activeElement"):
                assert target.evaluate(_IS_VISIBLE), f"the focus of {target} is not visible"
                return
            self.page.keyboard.press("Tab")
        raise AssertionError(f"{target} can't be reached with Tab")

    def activate(self, target: Locator) -> None:
        """Follow a link, or press a button."""
        self.reach(target)
        self.page.keyboard.press("Enter")

    def type_into(self, target: Locator, text: str) -> None:
        self.reach(target)
        self.page.keyboard.press("Control+a")
        self.page.keyboard.type(text)
