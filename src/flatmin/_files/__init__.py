"""Files in folders that may be anybody's: every one that flatmin writes or reads in a run's folder goes through here.

Written beside and renamed, so that a crash leaves the old content or the new; read only if it is a file, of a bounded
size. Nothing that lies in such a folder is followed: links, pipes and devices are refused by name.
"""

from ._lock import LOCK as LOCK
from ._lock import locked as locked
from ._open import WrongKindError as WrongKindError
from ._open import check_folder as check_folder
from ._open import open_file as open_file
from ._read import LARGEST as LARGEST
from ._read import LARGEST_SETUP as LARGEST_SETUP
from ._read import parse_json as parse_json
from ._read import read_bytes as read_bytes
from ._read import read_json as read_json
from ._read import read_text as read_text
from ._write import append_line as append_line
from ._write import copy_file as copy_file
from ._write import plain as plain
from ._write import remove as remove
from ._write import sync as sync
from ._write import write_json as write_json
from ._write import write_lines as write_lines
from ._write import write_new as write_new
from ._write import write_whole as write_whole
