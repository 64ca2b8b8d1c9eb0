import Foundation

public enum ModelStoreError: Error, Equatable, Sendable {
    case unreadable(String)
    case noManifest(String)
    case newerFormat(Int)
    case notAModel(String)
    case wrongSize(expected: Int64, got: Int64)
    case wrongChecksum
    case noSpace(short: Int64)
    case exists(String)
}

extension ModelStoreError: LocalizedError {
    public var errorDescription: String? {
        switch self {
        case .unreadable(let name): "\(name) cannot be read."
        case .noManifest(let name): "\(name) is not a manifest of an exported model."
        case .newerFormat(let format): "The model was exported by a newer version (format \(format))."
        case .notAModel(let name): "\(name) is not a GGUF file."
        case .wrongSize(let expected, let got): "The file has \(got) bytes instead of \(expected): the copy is incomplete."
        case .wrongChecksum: "The file's checksum is not the expected one: it is damaged."
        case .noSpace(let short): "There is not enough space on the device: \(short / 1_000_000 + 1) MB more are needed."
        case .exists(let name): "There is a model named \(name) already."
        }
    }
}

/// The models of the app: a folder with one folder per model, which holds the GGUF file and its manifest.
///
/// A model appears only when it is complete and its checksum is right: it is written under a hidden name first.
public struct ModelStore: Sendable {
    /// SHA-256 of a file, as hexadecimal digits.
    public typealias Digest = @Sendable (URL) async throws -> String

    public struct Entry: Sendable, Equatable, Identifiable {
        public let folder: URL
        public let manifest: ModelManifest

        public var id: String { folder.lastPathComponent }
        public var file: URL { folder.appendingPathComponent(manifest.file) }
    }

    public let folder: URL
    private let digest: Digest

    /// Creates the folder, and removes what an import that was interrupted left in it.
    public init(folder: URL, digest: @escaping Digest) throws {
        self.folder = folder
        self.digest = digest
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        for name in try FileManager.default.contentsOfDirectory(atPath: folder.path) where name.hasPrefix(".import-") {
            try FileManager.default.removeItem(at: folder.appendingPathComponent(name))
        }
    }

    /// By name. A folder without a manifest that can be read is none of ours.
    public func entries() throws -> [Entry] {
        try FileManager.default.contentsOfDirectory(at: folder, includingPropertiesForKeys: nil)
            .compactMap { url in
                let folder = entryFolder(url.lastPathComponent)
                return (try? ModelManifest.read(folder.appendingPathComponent(ModelManifest.fileName)))
                    .map { Entry(folder: folder, manifest: $0) }
            }
            .filter { FileManager.default.fileExists(atPath: $0.file.path) }
            .sorted { ($0.manifest.name, $0.id) < ($1.manifest.name, $1.id) }
    }

    /// Imports a folder of `edge-stream export-ios`, or a GGUF file. The original stays.
    /// `expected`: what the file must be, where that is known from elsewhere (a download).
    public func add(
        _ source: URL, expected: ModelManifest? = nil, move: Bool = false,
        onProgress: (@Sendable (Double) -> Void)? = nil
    ) async throws -> Entry {
        var isFolder: ObjCBool = false
        guard FileManager.default.fileExists(atPath: source.path, isDirectory: &isFolder) else {
            throw ModelStoreError.unreadable(source.lastPathComponent)
        }
        var manifest = expected
        var file = source
        if isFolder.boolValue {
            let found = try ModelManifest.read(source.appendingPathComponent(ModelManifest.fileName))
            (manifest, file) = (found, source.appendingPathComponent(found.file))
        }
        try check(file, manifest)
        if !move { try checkSpace(for: file) }

        let name = manifest?.file ?? file.lastPathComponent
        let target = entryFolder(Self.folderName(manifest?.name ?? Self.stem(name)))
        guard !FileManager.default.fileExists(atPath: target.path) else {
            throw ModelStoreError.exists(target.lastPathComponent)
        }
        let partial = folder.appendingPathComponent(".import-\(UUID().uuidString)")
        try FileManager.default.createDirectory(at: partial, withIntermediateDirectories: false)
        do {
            let copy = partial.appendingPathComponent(name)
            if move {
                try FileManager.default.moveItem(at: file, to: copy)
            } else {
                try await Self.copy(file, to: copy, onProgress)
            }
            let found = try await digest(copy)
            if let manifest, manifest.sha256.lowercased() != found { throw ModelStoreError.wrongChecksum }
            let size = try Self.size(copy)
            let kept = manifest ?? ModelManifest(name: Self.stem(name), file: name, bytes: size, sha256: found)
            try kept.write(to: partial.appendingPathComponent(ModelManifest.fileName))
            try Task.checkCancellation()
            try FileManager.default.moveItem(at: partial, to: target)
            return Entry(folder: target, manifest: kept)
        } catch {
            try? FileManager.default.removeItem(at: partial)
            throw error
        }
    }

    public func remove(_ entry: Entry) throws {
        try FileManager.default.removeItem(at: entry.folder)
    }

    //
    // files
    //

    private func entryFolder(_ name: String) -> URL {
        folder.appendingPathComponent(name, isDirectory: true)
    }

    private func check(_ file: URL, _ manifest: ModelManifest?) throws {
        guard let handle = try? FileHandle(forReadingFrom: file) else {
            throw ModelStoreError.unreadable(file.lastPathComponent)
        }
        defer { try? handle.close() }
        let magic = try handle.read(upToCount: 4)
        guard magic == Data("GGUF".utf8) else {
            throw ModelStoreError.notAModel(file.lastPathComponent)
        }
        let size = try Self.size(file)
        if let manifest, manifest.bytes != size {
            throw ModelStoreError.wrongSize(expected: manifest.bytes, got: size)
        }
    }

    private func checkSpace(for file: URL) throws {
        let size = try Self.size(file)
        let system = try FileManager.default.attributesOfFileSystem(forPath: folder.path)
        if let free = (system[.systemFreeSize] as? NSNumber)?.int64Value, free < size {
            throw ModelStoreError.noSpace(short: size - free)
        }
    }

    /// In pieces, away from the threads that tasks share, so that it shows progress and can be cancelled.
    private static func copy(_ file: URL, to copy: URL, _ onProgress: (@Sendable (Double) -> Void)?) async throws {
        let total = Double(max(1, try size(file)))
        try Data().write(to: copy)
        let source = try FileHandle(forReadingFrom: file)
        let target = try FileHandle(forWritingTo: copy)
        defer {
            try? source.close()
            try? target.close()
        }
        var done = 0
        while true {
            try Task.checkCancellation()
            let count = try await offPool {
                let piece = try source.read(upToCount: 4 << 20) ?? Data()
                try target.write(contentsOf: piece)
                return piece.count
            }
            if count == 0 {
                return try await offPool { try target.synchronize() }
            }
            done += count
            onProgress?(Double(done) / total)
        }
    }

    private static func offPool<Value: Sendable>(_ work: @escaping @Sendable () throws -> Value) async throws -> Value {
        try await withCheckedThrowingContinuation { continuation in
            DispatchQueue.global(qos: .utility).async {
                continuation.resume(with: Result { try work() })
            }
        }
    }

    private static func size(_ file: URL) throws -> Int64 {
        let attributes = try FileManager.default.attributesOfItem(atPath: file.path)
        return (attributes[.size] as? NSNumber)?.int64Value ?? 0
    }

    private static func stem(_ name: String) -> String {
        name.lowercased().hasSuffix(".gguf") ? String(name.dropLast(5)) : name
    }

    private static func folderName(_ name: String) -> String {
        let kept = name.map { $0.isLetter || $0.isNumber || "-._".contains($0) ? $0 : "-" }
        let trimmed = String(kept).drop { $0 == "." || $0 == "-" }
        return trimmed.isEmpty ? "model" : String(trimmed.prefix(100))
    }
}
