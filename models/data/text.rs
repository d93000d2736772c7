//! Captions as numbers: BERT's word pieces (official FLIP) and CLIP's byte pairs (open_clip).
//!
//! Vocabularies are the user's files: `vocab.txt` of `bert-base-uncased`; `vocab.json` and `merges.txt`, or
//! `bpe_simple_vocab_16e6.txt`, of CLIP. Two small ones for the captions of the digits are part of the program.

use flate2::read::GzDecoder;
use smalti::{Error, Result, Tensor, ensure};
use std::{collections::HashMap, fs, io::Read, path::Path};
use tokenizers::{
    SplitDelimiterBehavior, Tokenizer as Pieces,
    models::{
        bpe::{BPE, Merges, Vocab},
        wordpiece::WordPiece,
    },
    normalizers::{BertNormalizer, NFC},
    pre_tokenizers::{
        bert::BertPreTokenizer,
        byte_level::ByteLevel,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

/// Byte pairs that CLIP's vocabulary uses of the longer list in `bpe_simple_vocab_16e6.txt`.
const CLIP_MERGES: usize = 49_408 - 512 - 2;

/// What a text of CLIP is cut into before byte pairs are joined: contractions, words, single digits, the rest.
const CLIP_WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// Turns texts into rows of token ids of one length.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    pieces: Pieces,
    /// Ids that CLIP puts before and behind a text.
    ends: Option<[i64; 2]>,
    length: usize,
}

impl Tokenizer {
    /// BERT's, uncased, from a `vocab.txt` with one piece a line, as official FLIP has it: nothing is put around a
    /// text, pieces of all words follow each other, what is beyond `length` (32) is cut off, shorter texts are
    /// filled up with 0.
    ///
    /// # Errors
    /// If the file cannot be read or lacks `[PAD]` in its first line or `[UNK]`.
    pub fn wordpiece(vocab: &Path, length: usize) -> Result<Tokenizer> {
        Self::wordpiece_of(&read(vocab)?, vocab, length)
    }

    /// CLIP's from Hugging Face's files: start, byte pairs of the lower-cased text, end, filled up with 0 to `length`
    /// (77). Longer texts are cut off before the end token.
    ///
    /// Texts are cleaned as in CLIP's own tokenizer: entities of HTML resolved twice, quotes made straight, white space
    /// joined, Unicode's form C. What `ftfy` does there beyond that, repairing wrongly decoded text and taking
    /// ligatures apart, is left out.
    ///
    /// # Errors
    /// If a file cannot be read, or `vocab` lacks a byte, a merged pair, `<|startoftext|>` or `<|endoftext|>`, or its
    /// largest id is not the end's.
    pub fn clip(vocab: &Path, merges: &Path, length: usize) -> Result<Tokenizer> {
        let ids: HashMap<String, u32> = serde_json::from_str(&read(vocab)?)
            .map_err(|e| Error::format(vocab, format!("not a JSON object from tokens to ids: {e}")))?;
        let merges = parse_merges(&read(merges)?, merges)?;
        Self::clip_of(ids, merges, vocab, length)
    }

    /// CLIP's from its own list of byte pairs, `bpe_simple_vocab_16e6.txt` or the same with `.gz`: ids are those of
    /// bytes, bytes that end a word, pairs in their order (at most CLIP's 48,894), start, end.
    ///
    /// # Errors
    /// If the file cannot be read or a line is no pair.
    pub fn clip_merges(merges: &Path, length: usize) -> Result<Tokenizer> {
        Self::clip_merges_of(&read(merges)?, merges, length)
    }

    /// Word pieces that spell the [captions of the digits](super::DIGIT_TEMPLATES), a word a piece, other words
    /// letter by letter.
    ///
    /// # Errors
    /// None: the vocabulary is part of the program.
    pub fn digits_wordpiece(length: usize) -> Result<Tokenizer> {
        Self::wordpiece_of(include_str!("files/digits_vocab.txt"), Path::new("digits_vocab.txt"), length)
    }

    /// CLIP's byte pairs in small, for the [captions of the digits](super::DIGIT_TEMPLATES).
    ///
    /// # Errors
    /// None: the vocabulary is part of the program.
    pub fn digits_clip(length: usize) -> Result<Tokenizer> {
        Self::clip_merges_of(include_str!("files/digits_merges.txt"), Path::new("digits_merges.txt"), length)
    }

    fn wordpiece_of(text: &str, path: &Path, length: usize) -> Result<Tokenizer> {
        ensure!(length > 0, "tokenizer", "texts of length 0 hold nothing");
        let bad = |e: tokenizers::Error| Error::format(path, e.to_string());
        let vocab = WordPiece::read_bytes(text.as_bytes()).map_err(bad)?;
        if vocab.get("[PAD]") != Some(&0) || !vocab.contains_key("[UNK]") {
            let what = "needs one word piece a line, [PAD] in the first and [UNK] in another";
            return Err(Error::format(path, what));
        }
        let model = WordPiece::builder().vocab(vocab).unk_token("[UNK]".into()).build().map_err(bad)?;
        let mut pieces = Pieces::new(model);
        // control characters away, Chinese characters words of their own, lower case, and with it no accents
        pieces.with_normalizer(Some(BertNormalizer::new(true, true, None, true))).map_err(bad)?;
        pieces.with_pre_tokenizer(Some(BertPreTokenizer));
        Ok(Tokenizer { pieces, ends: None, length })
    }

    fn clip_merges_of(text: &str, path: &Path, length: usize) -> Result<Tokenizer> {
        let mut merges = parse_merges(text, path)?;
        merges.truncate(CLIP_MERGES);
        let bytes = byte_symbols();
        let words = bytes.iter().map(|c| format!("{c}</w>"));
        let tokens = bytes.iter().map(char::to_string).chain(words);
        let tokens = tokens.chain(merges.iter().map(|(a, b)| format!("{a}{b}")));
        let ends = ["<|startoftext|>", "<|endoftext|>"].map(str::to_owned);
        let ids = tokens.chain(ends).zip(0..).collect();
        Self::clip_of(ids, merges, path, length)
    }

    fn clip_of(ids: HashMap<String, u32>, merges: Merges, path: &Path, length: usize) -> Result<Tokenizer> {
        ensure!(length > 2, "tokenizer", "texts of length {length} leave no room between start and end");
        let bad = |e: tokenizers::Error| Error::format(path, e.to_string());
        let id = |token: &str| match ids.get(token) {
            Some(&id) => Ok(i64::from(id)),
            None => Err(Error::format(path, format!("the vocabulary lacks the token {token}"))),
        };
        // a piece without an id would be dropped without a word
        for symbol in byte_symbols() {
            id(&symbol.to_string())?;
            id(&format!("{symbol}</w>"))?;
        }
        let ends = [id("<|startoftext|>")?, id("<|endoftext|>")?];
        if ids.values().any(|&id| i64::from(id) > ends[1]) {
            return Err(Error::format(
                path,
                "<|endoftext|> must have the largest id: texts are pooled there",
            ));
        }
        let vocab: Vocab = ids.iter().map(|(token, &id)| (token.clone(), id)).collect();
        let model = BPE::builder().vocab_and_merges(vocab, merges).end_of_word_suffix("</w>".into());
        let mut pieces = Pieces::new(model.build().map_err(bad)?);
        pieces.with_normalizer(Some(NFC)).map_err(bad)?;
        let words = SplitPattern::Regex(CLIP_WORDS.into());
        let words = Split::new(words, SplitDelimiterBehavior::Removed, true).map_err(bad)?;
        let bytes = ByteLevel::new(false, false, false);
        pieces.with_pre_tokenizer(Some(Sequence::new(vec![words.into(), bytes.into()])));
        Ok(Tokenizer { pieces, ends: Some(ends), length })
    }

    /// Number of ids that there are; the model's `vocab_size` must not be smaller.
    pub fn vocab_size(&self) -> usize {
        self.pieces.get_vocab_size(false)
    }

    /// Tokens a text has.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The ids of a text, `length` of them.
    ///
    /// # Errors
    /// If the tokenizer fails on it.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        let cleaned = if self.ends.is_some() { clean(text) } else { text.to_owned() };
        let encoding = self.pieces.encode_fast(cleaned, false);
        let encoding = encoding.map_err(|e| Error::msg(format!("tokenizer: {e} in the text {text:?}")))?;
        let pieces = encoding.get_ids().iter().map(|&id| i64::from(id));
        let mut ids: Vec<i64> = match self.ends {
            Some([start, end]) => {
                let inner = pieces.take(self.length - 2);
                [start].into_iter().chain(inner).chain([end]).collect()
            }
            None => pieces.take(self.length).collect(),
        };
        ids.resize(self.length, 0);
        Ok(ids)
    }

    /// The ids of texts, `[N, length]` i64.
    ///
    /// # Errors
    /// If there are none, or the tokenizer fails on one.
    pub fn encode_all<S: AsRef<str>>(&self, texts: &[S]) -> Result<Tensor> {
        ensure!(!texts.is_empty(), "tokenizer", "there are no texts");
        let mut ids = Vec::with_capacity(texts.len() * self.length);
        for text in texts {
            ids.extend(self.encode(text.as_ref())?);
        }
        Tensor::from_slice(&ids, [texts.len(), self.length])
    }
}

/// As CLIP's own tokenizer: entities resolved twice (captions from web pages are often escaped twice), straight quotes,
/// one space between words, lower case.
fn clean(text: &str) -> String {
    let once = html_escape::decode_html_entities(text);
    let twice = html_escape::decode_html_entities(&once);
    let straight = |c| match c {
        '\u{2bc}' | '\u{2018}'..='\u{201b}' => '\'',
        '\u{201c}'..='\u{201f}' => '"',
        _ => c,
    };
    let straight: String = twice.chars().map(straight).collect();
    straight.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase()
}

/// The characters that stand for the bytes in byte pairs (GPT-2), in CLIP's order of ids: printable bytes stand for
/// themselves and come first, the others follow from U+0100 on.
fn byte_symbols() -> Vec<char> {
    let printable = || (b'!'..=b'~').chain(0xA1..=0xAC).chain(0xAE..=0xFF);
    let others = (0..=u8::MAX).filter(|b| !printable().any(|p| p == *b)).count() as u32;
    printable().map(char::from).chain((0x100..0x100 + others).filter_map(char::from_u32)).collect()
}

/// Pairs, one a line; the first line is a version.
fn parse_merges(text: &str, path: &Path) -> Result<Merges> {
    let mut merges = Vec::new();
    for (number, line) in text.lines().enumerate().skip(1).filter(|(_, line)| !line.trim().is_empty()) {
        let mut parts = line.split_whitespace();
        match (parts.next(), parts.next(), parts.next()) {
            (Some(a), Some(b), None) => merges.push((a.to_owned(), b.to_owned())),
            _ => {
                return Err(Error::format(path, format!("line {}: not two tokens to be joined", number + 1)));
            }
        }
    }
    Ok(merges)
}

/// A text file, unpacked if its name ends in `.gz`.
fn read(path: &Path) -> Result<String> {
    let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
    let mut text = String::new();
    if path.extension().is_some_and(|e| e == "gz") {
        GzDecoder::new(bytes.as_slice()).read_to_string(&mut text).map_err(|e| Error::io(path, e))?;
        return Ok(text);
    }
    String::from_utf8(bytes).map_err(|e| Error::format(path, format!("not a text in UTF-8: {e}")))
}

#[cfg(test)]
mod tests;
