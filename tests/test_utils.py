"""Text in messages."""
from utils import one_line


def test_one_line():
    assert one_line('a\tb\r\n\x1b[31m \x07c\udcff é') == r'a b \x1b[31m \x07c\udcff é'
    assert one_line('a' * 301) == 'a' * 300 + '...' and one_line('a' * 300) == 'a' * 300
