//! A checkpoint's tensors, handed out by name and read in pieces, so that they need not be in memory twice.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs::File;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use rustix::fs::{Advice, fadvise};

use super::checkpoint::{Place, TensorFiles};
use super::dtype::Dtype;
use super::error::{LoadError, LoadResult};
use super::safetensors::widen;

/// Bytes that are read at a time.
const PIECE: usize = 4 << 20;
/// Bytes at either end of a tensor that enter the fingerprint.
const SAMPLE: usize = 4 << 10;
/// Files that are kept open; a checkpoint has up to hundreds.
const OPEN_FILES: usize = 16;

/// How far loading is.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Progress {
    /// Bytes of weights read.
    pub loaded: u64,
    /// Bytes of weights in the files.
    pub total: u64,
}

/// The tensors of a folder and the means to read them. Remembers which were asked for.
pub struct Weights<'a> {
    tensors: &'a TensorFiles,
    claimed: RefCell<HashSet<String>>,
    open: RefCell<Vec<(usize, Rc<File>)>>,
    samples: RefCell<BTreeMap<String, blake3::Hash>>,
    loaded: Cell<u64>,
    total: u64,
    report: &'a dyn Fn(Progress),
    drop_pages: bool,
}

/// Some rows of a tensor that is read as a matrix of its last dimension.
#[derive(Clone)]
pub struct Part<'a> {
    /// The tensor's name.
    pub name: &'a str,
    /// How its numbers are stored.
    pub dtype: Dtype,
    /// Which rows.
    pub rows: Range<usize>,
    /// Numbers in a row.
    pub inputs: usize,
    place: &'a Place,
    weights: &'a Weights<'a>,
}

impl<'a> Weights<'a> {
    /// The tensors of a folder; `report` is told of progress after every few megabytes.
    pub fn new(tensors: &'a TensorFiles, report: &'a dyn Fn(Progress)) -> Self {
        Self {
            tensors,
            claimed: RefCell::default(),
            open: RefCell::default(),
            samples: RefCell::default(),
            loaded: Cell::new(0),
            total: tensors.bytes(),
            report,
            drop_pages: false,
        }
    }

    /// Drops pages of the files from the page cache as soon as they were read: for limits that weights and files do not
    /// fit together.
    #[must_use]
    pub fn dropping_pages(self) -> Self {
        Self { drop_pages: true, ..self }
    }

    /// Whether there is such a tensor.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.places.contains_key(name)
    }

    /// All rows of a tensor of exactly this shape.
    ///
    /// # Errors
    /// [`LoadError`] when the tensor is missing, has another shape or holds no floats.
    pub fn whole(&self, name: &str, shape: &[usize]) -> LoadResult<Part<'_>> {
        let rows = shape.iter().rev().skip(1).product();
        self.rows(name, shape, 0..rows)
    }

    /// Some rows of a tensor of exactly this shape, all but the last dimension counted together.
    ///
    /// # Errors
    /// As [`Weights::whole`].
    pub fn rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> LoadResult<Part<'_>> {
        let Some((name, place)) = self.tensors.places.get_key_value(name) else {
            return Err(LoadError::corrupt(format!(
                "{} has no tensor {name:?} of shape {shape:?}, which its configuration asks for: the copy is incomplete, \
                 or the configuration belongs to another model",
                self.tensors.folder.display()
            )));
        };
        let file = self.tensors.files[place.file].display();
        if place.shape != shape {
            return Err(LoadError::corrupt(format!(
                "{file}: tensor {name:?} has the shape {:?}, the configuration asks for {shape:?}",
                place.shape
            )));
        }
        let Some(dtype) = place.stored.dtype() else {
            return Err(LoadError::unsupported(format!(
                "{file}: tensor {name:?} has dtype {}, must be F32, BF16 or F16: use the original \
                 checkpoint, with --quantization int8 or int4 where memory is short",
                place.stored
            )));
        };
        self.claimed.borrow_mut().insert(name.clone());
        Ok(Part { name, dtype, rows, inputs: shape.last().copied().unwrap_or(1), place, weights: self })
    }

    /// Names that nobody asked for.
    pub fn unclaimed(&self) -> Vec<&'a str> {
        let claimed = self.claimed.borrow();
        self.tensors.places.keys().map(String::as_str).filter(|name| !claimed.contains(*name)).collect()
    }

    /// A digest of what was read: every tensor's name, format and shape, and the bytes at either end of it. Tells
    /// checkpoints apart that were trained apart; it is no protection against forgery.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for (name, sample) in &*self.samples.borrow() {
            let place = &self.tensors.places[name];
            hasher.update(format!("{name} {} {:?}\n", place.stored, place.shape).as_bytes());
            hasher.update(sample.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    fn file(&self, index: usize) -> LoadResult<Rc<File>> {
        let mut open = self.open.borrow_mut();
        if let Some((_, file)) = open.iter().find(|(known, _)| *known == index) {
            return Ok(Rc::clone(file));
        }
        let path = &self.tensors.files[index];
        let file = Rc::new(File::open(path).map_err(|error| LoadError::io(path, &error))?);
        if open.len() == OPEN_FILES {
            open.remove(0);
        }
        open.push((index, Rc::clone(&file)));
        Ok(file)
    }

    fn advance(&self, bytes: usize) {
        self.loaded.set(self.loaded.get() + bytes as u64);
        (self.report)(Progress { loaded: self.loaded.get(), total: self.total });
    }
}

impl fmt::Debug for Part<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} × {} {}", self.name, self.rows, self.inputs, self.dtype)
    }
}

impl Part<'_> {
    /// Numbers in all rows.
    pub fn numbers(&self) -> usize {
        self.rows.len() * self.inputs
    }

    /// The file it lies in, for messages.
    pub fn file(&self) -> String {
        self.weights.tensors.files[self.place.file].display().to_string()
    }

    /// Reads the rows in pieces: `sink` gets the number of the piece's first row, counted from this part's first, and
    /// whole rows of little-endian numbers.
    ///
    /// # Errors
    /// [`LoadError`] when the file cannot be read, or what `sink` returns.
    pub fn stream(&self, mut sink: impl FnMut(usize, &[u8]) -> LoadResult<()>) -> LoadResult<()> {
        let weights = self.weights;
        let file = weights.file(self.place.file)?;
        let row = self.inputs * self.dtype.bytes();
        let at_once = (PIECE / row.max(1)).clamp(1, self.rows.len().max(1));
        let mut buffer = vec![0; at_once * row];
        let mut sample = blake3::Hasher::new();
        let mut done = 0;
        while done < self.rows.len() {
            let rows = at_once.min(self.rows.len() - done);
            let piece = &mut buffer[..rows * row];
            let offset = self.place.offset + ((self.rows.start + done) * row) as u64;
            file.read_exact_at(piece, offset).map_err(|error| {
                let path = &weights.tensors.files[self.place.file];
                match error.kind() {
                    std::io::ErrorKind::UnexpectedEof => LoadError::corrupt(format!(
                        "{} was cut short while tensor {:?} was read from it: copy it again",
                        path.display(),
                        self.name
                    )),
                    _ => LoadError::io(path, &error),
                }
            })?;
            if done == 0 {
                sample.update(&piece[..piece.len().min(SAMPLE)]);
            }
            if done + rows == self.rows.len() {
                sample.update(&piece[piece.len().saturating_sub(SAMPLE)..]);
            }
            sink(done, piece)?;
            if weights.drop_pages {
                // advice: nothing depends on it being taken
                let _ = fadvise(&*file, offset, NonZeroU64::new(piece.len() as u64), Advice::DontNeed);
            }
            weights.advance(rows * row);
            done += rows;
        }
        // parts of one tensor are read in order, so the chain is the same each time
        let mut samples = weights.samples.borrow_mut();
        if let Some(before) = samples.get(self.name) {
            sample.update(before.as_bytes());
        }
        samples.insert(self.name.to_owned(), sample.finalize());
        Ok(())
    }

    /// The error for a number that the format of its matrix cannot hold: a finite one in half precision, one that is not
    /// finite in a quantised format. Rows are counted from this part's first.
    pub fn out_of_range(&self, value: f32, row: usize, column: usize) -> LoadError {
        if !value.is_finite() {
            return LoadError::corrupt(format!(
                "{}: tensor {:?} cannot be quantised: the value {value} at row {}, column {column} is not a number in any \
                 range: copy the model again, or use --quantization none",
                self.file(),
                self.name,
                self.rows.start + row
            ));
        }
        LoadError::unsupported(format!(
            "{}: tensor {:?} does not fit float16: the value {value} at row {}, column {column} is beyond ±65504: use \
             --dtype float32 or bfloat16",
            self.file(),
            self.name,
            self.rows.start + row
        ))
    }

    /// All numbers, widened.
    ///
    /// # Errors
    /// As [`Part::stream`].
    pub fn read(&self) -> LoadResult<Vec<f32>> {
        let mut numbers = Vec::with_capacity(self.numbers());
        self.stream(|_, bytes| {
            numbers.extend(widen(self.dtype, bytes));
            Ok(())
        })?;
        Ok(numbers)
    }
}
