use super::*;
use crate::data::{DIGIT_NAMES, DIGIT_TEMPLATES};

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(root.path().join(name), text).unwrap();
    }
    root
}

/// Pieces behind one another, as `vocab.txt` has them.
const PIECES: &str = "[PAD]\n[UNK]\nthe\ncafe\nun\n##aff\n##able\nphoto\n,\n中\n##s\n'\ns\n[\n]\nsep\n";

fn wordpiece(length: usize) -> Tokenizer {
    let root = folder(&[("vocab.txt", PIECES)]);
    Tokenizer::wordpiece(&root.path().join("vocab.txt"), length).unwrap()
}

/// Places of pieces in a list, one a line.
fn ids(list: &str, pieces: &[&str]) -> Vec<i64> {
    pieces.iter().map(|p| list.lines().position(|line| line == *p).unwrap() as i64).collect()
}

#[test]
fn word_pieces_follow_one_another() {
    let tokenizer = wordpiece(12);
    let cases: [(&str, &[&str]); 7] = [
        // lower case, accents away
        ("The CAFÉ", &["the", "cafe"]),
        ("unaffable,photos", &["un", "##aff", "##able", ",", "photo", "##s"]),
        // a word with a part that is unknown is unknown as a whole
        ("unaffected the", &["[UNK]", "the"]),
        ("the中photo", &["the", "中", "photo"]),
        ("photo's", &["photo", "'", "s"]),
        // names of special tokens are words as any other
        ("[SEP]", &["[", "sep", "]"]),
        ("the\u{0} \u{200d}photo\u{fffd}", &["the", "photo"]),
    ];
    for (text, pieces) in cases {
        let mut want = ids(PIECES, pieces);
        want.resize(12, 0);
        assert_eq!(tokenizer.encode(text).unwrap(), want, "{text}");
    }
    assert_eq!(tokenizer.encode("").unwrap(), [0; 12]);
    assert_eq!(tokenizer.vocab_size(), 16);
}

#[test]
fn what_is_too_long_is_cut() {
    let short = wordpiece(3);
    assert_eq!(short.encode("the unaffable photo").unwrap(), ids(PIECES, &["the", "un", "##aff"]));
    let long = "x".repeat(101);
    assert_eq!(short.encode(&long).unwrap(), [1, 0, 0]);
}

#[test]
fn vocabularies_that_are_none_are_named() {
    let root = folder(&[("vocab.txt", "[UNK]\n[PAD]\n"), ("bytes.txt", "")]);
    let message = |name: &str| Tokenizer::wordpiece(&root.path().join(name), 8).unwrap_err().to_string();
    assert!(message("vocab.txt").contains("vocab.txt: needs one word piece a line"));
    assert!(message("missing.txt").contains("missing.txt"));
    fs::write(root.path().join("bytes.txt"), [0xFF, 0xFE]).unwrap();
    assert!(message("bytes.txt").contains("bytes.txt: not a text in UTF-8"));
}

const MERGES: &str = "#version: 0.2\nt h\nth e</w>\np h\nph o\nt o</w>\npho to</w>\n' s</w>\n";

fn clip(length: usize) -> Tokenizer {
    let root = folder(&[("merges.txt", MERGES)]);
    Tokenizer::clip_merges(&root.path().join("merges.txt"), length).unwrap()
}

/// Ids of bytes, of bytes at the end of a word, of the pairs by number.
fn byte(b: char) -> i64 {
    byte_symbols().iter().position(|c| *c == b).unwrap() as i64
}
fn last(b: char) -> i64 {
    256 + byte(b)
}
fn pair(n: i64) -> i64 {
    512 + n
}

#[test]
fn byte_pairs_between_start_and_end() {
    let tokenizer = clip(10);
    let [start, end] = [pair(7), pair(8)];
    let cases: [(&str, Vec<i64>); 9] = [
        ("The  photo\n", vec![pair(1), pair(5)]),
        ("\u{201c}the\u{201d} photo\u{2019}s", vec![last('"'), pair(1), last('"'), pair(5), pair(6)]),
        ("photo's", vec![pair(5), pair(6)]),
        ("thx", vec![pair(0), last('x')]),
        // digits stand alone, signs together
        ("12 ?!", vec![last('1'), last('2'), byte('?'), last('!')]),
        ("the photo &amp;amp; the", vec![pair(1), pair(5), last('&'), pair(1)]),
        // two bytes, one letter; composed beforehand
        ("e\u{301}", vec![byte('Ã'), last('©')]),
        (
            "<|endoftext|>",
            vec![byte('<'), last('|'), byte('e'), byte('n'), byte('d'), byte('o'), byte('f'), byte('t')],
        ),
        ("", vec![]),
    ];
    for (text, inner) in cases {
        let mut want = vec![start];
        want.extend(inner);
        want.push(end);
        want.resize(10, 0);
        assert_eq!(tokenizer.encode(text).unwrap(), want, "{text}");
    }
    assert_eq!((tokenizer.vocab_size(), tokenizer.length()), (512 + 7 + 2, 10));
    // what is too long loses its end, but not the end token
    let cut = clip(4).encode("the the the the").unwrap();
    assert_eq!(cut, [start, pair(1), pair(1), end]);
}

#[test]
fn hugging_face_files_mean_the_same() {
    let merged = MERGES.lines().skip(1).map(|line| line.replace(' ', ""));
    let bytes = byte_symbols();
    let tokens: Vec<String> = (bytes.iter().map(char::to_string))
        .chain(bytes.iter().map(|c| format!("{c}</w>")))
        .chain(merged)
        .chain(["<|startoftext|>".into(), "<|endoftext|>".into()])
        .collect();
    let json = |tokens: &[String]| {
        let ids: HashMap<&String, usize> = tokens.iter().zip(0..).collect();
        serde_json::to_string(&ids).unwrap()
    };
    let root = folder(&[("vocab.json", &json(&tokens)), ("merges.txt", MERGES), ("bad.txt", "#\na b c\n")]);
    let open = |merges: &str| Tokenizer::clip(&root.path().join("vocab.json"), &root.path().join(merges), 10);
    let text = "The photo's 3 ?? \u{1F600}";
    assert_eq!(open("merges.txt").unwrap().encode(text).unwrap(), clip(10).encode(text).unwrap());
    assert!(open("bad.txt").unwrap_err().to_string().contains("bad.txt: line 2"));
    let rewrite = |tokens: &[String]| {
        fs::write(root.path().join("vocab.json"), json(tokens)).unwrap();
        open("merges.txt").unwrap_err().to_string()
    };
    assert!(rewrite(&tokens[1..]).contains("vocab.json: the vocabulary lacks the token !"));
    assert!(rewrite(&tokens[..tokens.len() - 1]).contains("lacks the token <|endoftext|>"));
    let turned: Vec<String> = tokens.iter().rev().cloned().collect();
    assert!(rewrite(&turned).contains("largest id"));
    fs::write(root.path().join("vocab.json"), "[1]").unwrap();
    assert!(open("merges.txt").unwrap_err().to_string().contains("vocab.json: not a JSON object"));
}

#[test]
fn packed_lists_are_unpacked() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("merges.txt.gz");
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut packed, MERGES.as_bytes()).unwrap();
    fs::write(&path, packed.finish().unwrap()).unwrap();
    let tokenizer = Tokenizer::clip_merges(&path, 10).unwrap();
    assert_eq!(tokenizer.encode("the photo").unwrap(), clip(10).encode("the photo").unwrap());
}

/// No caption of a digit is cut, none has an unknown word, and every word is one token.
#[test]
fn digits_fit_their_vocabularies() {
    let (pieces, pairs) = (Tokenizer::digits_wordpiece(16).unwrap(), Tokenizer::digits_clip(16).unwrap());
    let mut seen = std::collections::HashSet::new();
    for (name, template) in DIGIT_NAMES.iter().flat_map(|n| DIGIT_TEMPLATES.iter().map(move |t| (n, t))) {
        let text = template.replace("{}", name);
        let words = text.split(' ').count() + text.matches(['.', ',']).count();
        let got = pieces.encode(&text).unwrap();
        let length = got.iter().position(|id| *id == 0).unwrap();
        assert!(length == words && !got.contains(&1), "{text}: {got:?}");
        assert!(seen.insert(got));
        let got = pairs.encode(&text).unwrap();
        assert_eq!(got.iter().position(|id| *id == 0).unwrap(), words + 2, "{text}: {got:?}");
        assert!(got.iter().all(|id| (*id as usize) < pairs.vocab_size()));
    }
    let tokens = pieces.encode_all(&["a photo", "zebra"]).unwrap();
    assert_eq!(tokens.shape(), [2, 16]);
    assert!(!tokens.to_vec::<i64>().unwrap().contains(&1), "other words are spelled");
    assert!(pieces.encode_all::<&str>(&[]).is_err());
}
