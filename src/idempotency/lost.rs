//! A part of the trail that is lost: keys that are not found are refused until the window is over.

use std::sync::{MutexGuard, PoisonError};

use super::claims::Verdict;
use super::refusal::Refused;
use super::{Idempotency, now};
use crate::audit::loss;
use crate::audit::loss::{Fault, Loss};

impl Idempotency {
    /// Refuses a key that is not found while a part of the trail is lost.
    pub(super) fn check_loss(&self, verdict: &Verdict) -> Result<(), Refused> {
        let is_new = matches!(verdict, Verdict::Begin { doubt: None });
        if is_new && self.is_lost() { Err(Refused::Lost) } else { Ok(()) }
    }

    /// What is lost of the trail, as long as that matters.
    pub fn loss(&self) -> Option<Loss> {
        self.present_loss().as_ref().map(|(loss, _)| loss.clone())
    }

    pub(super) fn is_lost(&self) -> bool {
        self.present_loss().is_some()
    }

    pub(super) fn present_loss(&self) -> MutexGuard<'_, Option<(Loss, u32)>> {
        let mut loss = self.loss.lock().unwrap_or_else(PoisonError::into_inner);
        if loss.as_ref().is_some_and(|(_, until)| *until < now()) {
            *loss = None;
            self.audit.set_damaged(false);
        }
        loss
    }

    /// The rebuild found something lost.
    pub(super) fn lose(&self, loss: Loss, window: u32) {
        let Loss { first: Fault { file, line, reason, .. }, word, .. } = &loss;
        if self.accept_loss.as_ref() == Some(word) {
            tracing::warn!(file, line, reason, "a part of the audit trail is lost, and that is accepted");
            self.audit.event(loss::ACCEPTED, loss.details());
            return;
        }
        tracing::warn!(
            file,
            line,
            reason,
            word,
            "a part of the audit trail is lost: Idempotency-Keys that are not found get 503; restore it, or accept the loss \
             with `ccsqm-gateway audit accept-loss` or `serve --accept-loss=<word>`"
        );
        self.audit.set_damaged(true);
        *self.loss.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((loss, now().saturating_add(window)));
    }
}
