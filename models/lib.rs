//! Nine vision papers on smalti.
