from .batches import PaddingCollator as PaddingCollator
from .batches import default_collator as default_collator
from .checks import require_disjoint as require_disjoint
from .encoding import encode_dataset as encode_dataset
from .pairs import PairedCollator as PairedCollator
from .pairs import PairedDataset as PairedDataset
from .row_identity import row_hash as row_hash
from .splits import load_rows as load_rows
