"""Heartbeats: raw electrocardiograms in, a class for each beat out. A complete domain of mambaseq."""

from mambaseq.domain import Domain

domain = Domain(
    name="ecg",
    summary="electrocardiograms: is a heartbeat normal, supraventricular, ventricular or a fusion?",
    datasets={"beats": ("mambaseq_ecg.beats:Beats", "MIT-BIH heartbeats, N S V F, split by patient (DS1/DS2)")},
    readers={"csv": ("mambaseq_ecg.reader:read_csv", "columns seconds, signal, beat at 100 Hz; a record a beat")},
    configs={"beats": ("mambaseq_ecg:configs/beats.yaml", "classify MIT-BIH heartbeats; 5 minutes on 2 cores")},
)
